"""Choose the scale of a merge by how far it takes image features, without labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cl_merge.callbacks.batches import (
    from_datamodule,
    own_samples,
    sum_over_processes,
    to_module,
    training_batches,
    trying,
)
from cl_merge.callbacks.features import check_own_features, give_features, image_features_of
from cl_merge.callbacks.others import is_kind
from cl_merge.class_statistics import unit
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import evaluating, install, swapped
from cl_merge.task_vectors.scales import Scales

log = logging.getLogger(__name__)

_ARGUMENT = "scale=DriftScale(features=...)"
# Interpolations between what is too far and what is not, and the least step between scales, as a
# share of the published one: coarse, so that rounding in features chooses no other.
_INTERPOLATIONS = 2
_RESOLUTION = 1 / 32
# Distances are summed as whole multiples of this, so that any order gives the same bits.
_STEP = 2.0**-24


@dataclass(frozen=True)
class DriftScale:
    """How `MergeCallback` caps its scale after each task: ``scale=DriftScale(limit=0.6)``.

    The scale is the published one, unless that takes the features of the current task's images too
    far: then it is the one at which the mean distance between unit features under the merged model
    and under the base is the limit, interpolated to a thirty-second of the published scale. Many
    tasks merged at a scale that was found for few then do not leave the region where the model
    works. No label and no held-out image is needed: four passes over some images.

    The images are those that the trainer's data module gives in ``sample_dataloader(images)``, each
    once over all processes, as a `TaskStream` does; or else the first ones of one more epoch over
    the training data. Distances are summed exactly, so that all processes choose the same.

    Args:
        limit: The distance, above 0; unit features are at most 2 apart.
        images: How many images to look at.
        features: Makes image features [B, D] of the module and a batch; by default
            ``module.features(batch[0])``.

    Raises:
        InputError: If the limit or the number of images is out of range.

    Example::

        MergeCallback("magmax", scale=DriftScale(limit=0.4))
    """

    limit: float = 0.6
    images: int = 32
    features: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.limit < float("inf"):
            raise InputError(f"limit={self.limit}; expected a finite number above 0")
        if type(self.images) is not int or self.images < 1:
            raise InputError(f"images={self.images}; expected a whole number from 1")

    def check(self, names: Iterable[str]) -> None:
        """There is nothing that names of parameters could lack."""

    def prepare(self, trainer: L.Trainer, module: L.LightningModule, held_out: Any) -> None:
        """Make sure before the training that the scale can be chosen after it.

        Raises:
            InputError: If the module has no features, or its parameters are sharded.
        """
        if self.features is None:
            check_own_features(module, give_features(_ARGUMENT))
        if is_kind(trainer.strategy, "ModelParallelStrategy"):
            raise InputError(
                "scale='drift' needs whole parameters, and ModelParallelStrategy shards them; give "
                "a number, or choose strategy='ddp'"
            )

    def try_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Make features of a task's first batch: what fails shows before the task trains."""
        with trying(trainer, module):
            self._features(trainer, module, batch)

    def batches(
        self, trainer: L.Trainer, module: L.LightningModule, held_out: Any
    ) -> Iterator[Any]:
        """Batches of the task's images, as many as are wanted or more."""
        own = from_datamodule(trainer, "sample_dataloader")
        if own is not None:
            yield from own(self.images)
        else:
            yield from training_batches(trainer, module)

    @torch.no_grad()
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

        Values makes what parameters and buffers of an evaluation hold at a scale; the published
        scale is the largest. What is live is written to.

        Raises:
            InputError: If there is no image, or features are not finite.
        """
        # Not the generators of devices, for which each process would have to use all of them.
        with isolate_rng(include_cuda=False), swapped(live, {}), evaluating(module):
            install(live, values(Scales.read(0.0, 0.0)))
            kept = self._first(trainer, module, batches)

            def distance(scale: float) -> float:
                install(live, values(Scales.read(scale, scale)))
                moved = [self._features(trainer, module, batch) for batch, _ in kept]
                pairs = zip(moved, (base for _, base in kept), strict=True)
                apart = torch.cat(
                    [(one[: len(base)] - base).double().norm(dim=1) for one, base in pairs]
                    or [torch.zeros(0, dtype=torch.float64)]
                )
                # NaN as whole number is undefined, and has to be the same in all processes.
                whole = (apart.nan_to_num(torch.inf).clamp(max=4.0) / _STEP).round().long()
                sums = torch.stack([whole.sum(), torch.tensor(len(whole))])
                total, images = sum_over_processes(trainer, module)(sums).tolist()
                if not images:
                    raise InputError("the task has no image to choose the scale on")
                return float(total * _STEP / images)

            far = distance(published)
            scale = self._search(distance, published, far) if far > self.limit else published
        found = Scales.read(scale, published)
        if trainer.is_global_zero:
            message = "scale %s: features drift by %.2f at the published %s, the limit being %s"
            log.info(message, found, far, published, self.limit)
        return found

    def _search(
        self, distance: Callable[[float], float], published: float, furthest: float
    ) -> float:
        """The scale at which the distance is the limit, by regula falsi on a grid."""
        step = published * _RESOLUTION
        low, near, high, far = 0.0, 0.0, published, furthest
        for left in reversed(range(_INTERPOLATIONS + 1)):
            middle = low + (high - low) * (self.limit - near) / (far - near)
            middle = step * round(middle / step)
            if middle in (low, high) or not left:
                break
            if (found := distance(middle)) > self.limit:
                high, far = middle, found
            else:
                low, near = middle, found
        return max(middle, step)

    def _first(
        self, trainer: L.Trainer, module: L.LightningModule, batches: Iterable[Any]
    ) -> list[tuple[Any, Tensor]]:
        """This process's share of the images: batches, and the unit features of what counts."""
        kept, left = [], own_samples(trainer, self.images) or 0
        for given in batches:
            batch = to_module(trainer, module, given)
            features = self._features(trainer, module, batch)[:left]
            kept.append((batch, features))
            left -= len(features)
            if not left:
                break
        return kept

    def _features(self, trainer: L.Trainer, module: Any, batch: Any) -> Tensor:
        """Unit features [B, D] on the CPU."""
        with trainer.precision_plugin.forward_context():
            features = image_features_of(self.features, "MergeCallback", _ARGUMENT)
            return unit(features(module, batch)).cpu()
