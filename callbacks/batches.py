"""Batches of a task's images inside a hook of its fit: one more pass over them, what they hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import evaluating

Logits = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""Makes logits [B, K] and targets [B] of a module and a batch."""

LOGITS = (
    "a function of module and batch that returns both logits [batch, classes] and targets [batch]"
)


def training_batches(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[Any]:
    """The batches of one more epoch over the training data, each as a training step gets it.

    Of a loader without an end as many as the fit has trained on, or is to train on.
    """
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    limit = trainer.num_training_batches
    if limit == float("inf"):
        trained = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        limit = trained or trainer.max_steps * trainer.accumulate_grad_batches
    for batch, _, _ in itertools.islice(loaders, int(limit)):
        yield to_module(trainer, pl_module, batch)


def from_datamodule(trainer: L.Trainer, method: str) -> Callable[..., Any] | None:
    """A method of a trainer's data module; None where there is none, or it has no such method."""
    return getattr(getattr(trainer, "datamodule", None), method, None)


def to_module(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Any:
    """Bring a batch to the module's device and to the precision of its inputs."""
    converted = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(converted, pl_module.device, dataloader_idx=0)


@contextmanager
def trying(trainer: L.Trainer, module: nn.Module) -> Iterator[None]:
    """Run a module on a batch to see that it works, so that training goes on as without."""
    precision = trainer.precision_plugin.forward_context()
    with torch.no_grad(), precision, evaluating(module), isolate_rng(include_cuda=False):
        yield


def own_samples(trainer: L.Trainer, limit: int | None = None) -> int | None:
    """How many samples are this process's own: samplers repeat some, so that all have as many.

    The limit is the most to take over all processes; None means all that the loader has.
    """
    shares = [] if limit is None else [-(-limit // trainer.world_size)]
    loader = trainer.train_dataloader
    # Where a loader has a batch sampler of its own, it is that one which samplers are put into.
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        shares.append(len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas)))  # type: ignore[arg-type]
    return min(shares, default=None)


def sum_over_processes(trainer: L.Trainer, module: L.LightningModule) -> Callable[[Tensor], Tensor]:
    """Make what sums a tensor over all processes, wherever it is, and leaves the sum there."""

    def total(tensor: Tensor) -> Tensor:
        # Processes communicate where the module is.
        summed = trainer.strategy.reduce(tensor.to(module.device), reduce_op="sum")
        return summed.to(tensor.device)

    return total


def inputs_and_targets(batch: Any, *, asking: str, give: str) -> tuple[Any, Any]:
    """Take a batch for a sequence of inputs, targets and what else there may be.

    Where it is something else, the error says who was asking, and what to give instead.
    """
    try:
        return batch[0], batch[1]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{asking} cannot tell inputs from targets in a batch of type {type(batch).__name__}; "
            f"give {give}"
        ) from error


def all_logits(module: Any, batch: Any, *, asking: str, give: str) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and targets [B] of a batch of inputs and targets, among all classes."""
    inputs, targets = inputs_and_targets(batch, asking=asking, give=give)
    forward = getattr(type(module), "forward", None)
    if getattr(forward, "__qualname__", "") == "LightningModule.forward":  # of whichever package
        raise InputError(f"{asking} asks the module for logits, but it has no forward; give {give}")
    return module(inputs), targets


def pairs_of(given: Logits, give: str) -> Logits:
    """The user's function of module and batch, which must return two tensors; what to give."""
    return partial(_pair, given, give)


def _pair(given: Logits, give: str, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    found: Any = given(module, batch)
    if isinstance(found, (tuple, list)) and [isinstance(t, Tensor) for t in found] == [True, True]:
        return found[0], found[1]
    raise wrong_result(found, give)


def wrong_result(found: object, give: str) -> InputError:
    """Make the error for what a user's function returned; it says what to give."""
    many = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
    return InputError(f"the function returned a {type(found).__name__}{many}; give {give}")


def task_logits(module: Any, batch: Any, *, asking: str, give: str) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and targets [B] of a training batch, from the module itself if it has them."""
    own: Callable[[Any], tuple[Tensor, Tensor]] | None = getattr(module, "task_logits", None)
    return own(batch) if own is not None else all_logits(module, batch, asking=asking, give=give)
