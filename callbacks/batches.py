"""Batches of a task's images inside a hook of its fit: one more pass over them, what they hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler

from cl_merge.errors import InputError

LOGITS = (
    "a function of module and batch that returns both logits [batch, classes] and targets [batch]"
)


def training_batches(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[Any]:
    """The batches of one more epoch over the task's training data, on the module's device.

    Args:
        trainer: The task's trainer.
        pl_module: The module.

    Yields:
        Each batch as a training step gets it.
    """
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    number = trainer.num_training_batches
    whole = int(number) if number != float("inf") else None
    for batch, _, _ in itertools.islice(loaders, whole):
        yield placed(trainer, pl_module, batch)


def placed(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Any:
    """Bring a batch to the module's device and to the precision of its inputs.

    Args:
        trainer: The trainer.
        pl_module: The module.
        batch: As a loader gives it.

    Returns:
        The batch as a step of the module gets it.
    """
    converted = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(converted, pl_module.device, dataloader_idx=0)


def own_samples(trainer: L.Trainer, limit: int | None = None) -> int | None:
    """How many samples are this process's own: samplers repeat some, so that all have as many.

    Args:
        trainer: The task's trainer.
        limit: The most to take over all processes.

    Returns:
        The number; None for all that the loader has.
    """
    shares = [] if limit is None else [-(-limit // trainer.world_size)]
    loader = trainer.train_dataloader
    # Where a loader has a batch sampler of its own, it is that one which samplers are put into.
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        shares.append(len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas)))  # type: ignore[arg-type]
    return min(shares, default=None)


def inputs_and_targets(batch: Any, *, asking: str, give: str) -> tuple[Any, Any]:
    """Take a batch for a sequence of inputs, targets and what else there may be.

    Args:
        batch: As a step of the module gets it.
        asking: Who asks, for the error.
        give: What to give instead where a batch is something else, for the error.

    Returns:
        Inputs and targets.

    Raises:
        InputError: If the batch is something else.
    """
    try:
        return batch[0], batch[1]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{asking} cannot tell inputs from targets in a batch of type {type(batch).__name__}; "
            f"give {give}"
        ) from error
