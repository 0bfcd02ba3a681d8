"""Choose the scale of a merge on images that were held out of the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cl_merge.callbacks.batches import (
    LOGITS,
    Logits,
    all_logits,
    from_datamodule,
    pairs_of,
    sum_over_processes,
    to_module,
    trying,
)
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import evaluating, install, swapped
from cl_merge.task_vectors.scale_search import block_groups, read_groups, search_scale
from cl_merge.task_vectors.scales import Scales, check_fits
from cl_merge.task_vectors.shards import reshard

log = logging.getLogger(__name__)

Loader = Callable[[], Iterable[Any]]
"""Makes batches of the held-out images of all tasks so far."""


@dataclass(frozen=True)
class AutoScale:
    """How `MergeCallback` chooses its scale after each task: ``scale=AutoScale(groups="block")``.

    The scale is the one at which the merged model gets most held-out images of all tasks so far
    right, by `search_scale`. They are classified as a test does it: among all
    classes of the module, not told which task they are of, under the trainer's precision, with the
    buffers of an evaluation. Test images play no part. Under DDP the counts are summed over
    processes, so that all choose the same.

    Each scale takes a pass over the held-out images, of which a `TaskStream` keeps the transformed
    ones in memory. Layers before the first merged one are not cached: which they are cannot be told
    from outside of a module's ``forward``, and with a whole encoder merged there are none.

    Args:
        groups: A factor for each group of layers instead of one: ``"block"`` for one per numbered
            block, or patterns on parameter names, each a group. Four more passes for each group.
        logits: Makes logits [B, K] and targets [B] of the module and a batch; by default
            ``module(batch[0]), batch[1]``.

    Raises:
        InputError: If the groups are something else.

    Example::

        MergeCallback("magmax", scale=AutoScale(groups=["*attn*", "*mlp*"]))
    """

    groups: str | tuple[str, ...] = ()
    logits: Logits | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", read_groups(self.groups))

    def check(self, names: Iterable[str]) -> None:
        """Make sure that every group has one of the parameters that are merged.

        Raises:
            InputError: If a pattern fits none.
        """
        names = list(names)
        for pattern in self.groups if isinstance(self.groups, tuple) else ():
            check_fits("groups", pattern, names)

    def prepare(
        self, trainer: L.Trainer, module: L.LightningModule, held_out: Loader | None
    ) -> None:
        """Raise `InputError` before the training if held-out images cannot be classified."""
        with isolate_rng(include_cuda=False):
            batch = next(iter(held_out_batches(trainer, held_out)), None)
        if batch is not None:
            with trying(trainer, module):
                self._classify(module, to_module(trainer, module, batch))
            reshard(module)

    def batches(
        self, trainer: L.Trainer, module: L.LightningModule, held_out: Loader | None
    ) -> Iterable[Any]:
        """The held-out images of the tasks so far."""
        return held_out_batches(trainer, held_out)

    def choose(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batches: Iterable[Any],
        names: Sequence[str],
        values: Callable[[Scales], Iterable[tuple[str, Tensor]]],
        published: float,
        live: Mapping[str, Tensor],
    ) -> Scales:
        """Find the scale of a task that ended, leaving the module as it is.

        The batches are the held-out images, the names those of the parameters that are merged;
        values makes what parameters and buffers of an evaluation hold at a scale, of which the
        published one plays no part. What is live is written to.

        Raises:
            InputError: If there is no held-out image, or the logits cannot be found.
        """
        total = 0

        def count(scales: Scales) -> int:
            nonlocal total
            install(live, values(scales))
            correct, total = self._count(trainer, module, batches)
            return correct

        groups = block_groups(names) if self.groups == "block" else self.groups
        with swapped(live, {}), evaluating(module):
            best = search_scale(count, groups=groups)
        if trainer.is_global_zero:
            log.info(
                "scale %s gets %.1f %% of %d held-out images right, the best of %d that were tried",
                best.scales,
                100 * best.correct / total,
                total,
                best.evaluated,
            )
        return best.scales

    @torch.no_grad()
    def _count(
        self, trainer: L.Trainer, module: L.LightningModule, batches: Iterable[Any]
    ) -> tuple[int, int]:
        """Images that are classified correctly, and all, over all processes."""
        counts = torch.zeros(2, dtype=torch.int64, device=module.device)
        with trainer.precision_plugin.forward_context():
            for batch in batches:
                logits, targets = self._classify(module, to_module(trainer, module, batch))
                counts[0] += (logits.argmax(dim=1) == targets).sum()
                counts[1] += len(targets)
        reshard(module)  # the next weights are put into the sharded parameters
        correct, total = sum_over_processes(trainer, module)(counts).tolist()
        if not total:
            raise InputError("there is no held-out image to choose the scale on")
        return correct, total

    def _classify(self, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        give = f"scale=AutoScale(logits=...), {LOGITS}"
        if self.logits is not None:
            return pairs_of(self.logits, give)(module, batch)
        return all_logits(module, batch, asking="MergeCallback", give=give)


def held_out_batches(trainer: L.Trainer, own: Loader | None) -> Iterable[Any]:
    """The held-out images of the tasks so far, of the user's loader or else the data module's."""
    own = own or from_datamodule(trainer, "held_out_dataloader")
    if own is None:
        raise InputError(
            "scale='auto' needs images that are not trained on: give MergeCallback(held_out=...), "
            "a function that makes a loader of those of the tasks so far, or fit with a datamodule "
            "that has held_out_dataloader(), such as TaskStream(..., held_out=0.1)"
        )
    if not callable(own):
        raise InputError(
            f"held_out is a {type(own).__name__}; expected a function that makes a loader of the "
            "held-out images of the tasks so far, as in held_out=lambda: loader"
        )
    return own()
