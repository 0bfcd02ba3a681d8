"""Image features of a task's images, under two sets of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_merge.callbacks.batches import inputs_and_targets, own_samples, placed, training_batches
from cl_merge.class_statistics import unit
from cl_merge.errors import InputError

Features = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""Makes image features [B, D] and labels [B] of a module and a batch."""

_OTHERS = (
    "ClassStatistics(features=...), a function of module and batch that returns image "
    "features [batch, features] and labels [batch]"
)


class Read(NamedTuple):
    """What one process has read of a task's images, on the CPU.

    Attributes:
        base: Unit features under the base weights, float32 [N, D]; N may be 0.
        live: The same under the weights that the module holds.
        labels: int64 [N].
    """

    base: Tensor
    live: Tensor
    labels: Tensor


class WithWeights(nn.Module):
    """A module's features under other weights than those it holds, which stay where they are.

    Args:
        module: The module.
        features: Makes features and labels of module and batch.
        weights: Parameters and buffers to use in the place of its own, by name, on its device.
    """

    def __init__(
        self, module: nn.Module, features: Features, weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.module = module
        self._features = features
        self._weights = {f"module.{name}": tensor for name, tensor in weights.items()}

    def forward(self, batch: Any) -> Tensor:
        """Features of a batch under the module's own weights, [B, D]."""
        return self._features(self.module, batch)[0]

    def read(self, batch: Any) -> Tensor:
        """Features of a batch under the other weights, [B, D]."""
        found: Tensor = functional_call(self, self._weights, (batch,))
        return found


def own_features(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Ask a module for its features, as `CLIPClassifier` has them.

    Args:
        module: Has a method ``features`` of images.
        batch: Images and labels; more is ignored.

    Returns:
        Features [B, D] and labels [B].

    Raises:
        InputError: If it has no such method, or the batch is something else.
    """
    check_own_features(module)
    images, labels = inputs_and_targets(batch, asking="ClassStatistics", give=_OTHERS)
    return module.features(images), labels


def check_own_features(module: Any) -> None:
    """Check that a module has features of its own.

    Args:
        module: Any module.

    Raises:
        InputError: If it has no method ``features``.
    """
    if not callable(getattr(module, "features", None)):
        raise InputError(f"{type(module).__name__} has no method features(images); give {_OTHERS}")


def sum_over_processes(trainer: L.Trainer, module: L.LightningModule) -> Callable[[Tensor], Tensor]:
    """Make what sums tensors over all processes, from the CPU to the CPU.

    Args:
        trainer: The trainer, in one of its hooks.
        module: The module, on the device where processes communicate.

    Returns:
        A function of a tensor that all processes call together.
    """

    def total(tensor: Tensor) -> Tensor:
        return trainer.strategy.reduce(tensor.to(module.device), reduce_op="sum").cpu()

    return total


@torch.no_grad()
def read_features(
    trainer: L.Trainer,
    module: L.LightningModule,
    features: Features,
    base: Mapping[str, Tensor],
    batches: Iterable[Any] | None,
) -> Read:
    """Read features once over a task's images, under two sets of weights and the same precision.

    Args:
        trainer: The trainer, in one of its hooks.
        module: The module, in evaluation mode.
        features: Makes features and labels of module and batch.
        base: The base weights and buffers, by name, on the module's device; empty if the module
            holds them.
        batches: The images, each exactly once over all processes; None for one more epoch over
            the training data.

    Returns:
        What this process has read.

    Raises:
        InputError: If no process has an image, or features or labels are none.
    """
    left = own_samples(trainer) if batches is None else None
    source = (
        training_batches(trainer, module)
        if batches is None
        else (placed(trainer, module, batch) for batch in batches)
    )
    before = WithWeights(module, features, base)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with trainer.precision_plugin.forward_context():
        for batch in source:
            live, labels = _checked(*features(module, batch))
            read = (unit(before.read(batch) if base else live), unit(live), labels)
            found.append(tuple(tensor[:left].cpu() for tensor in read))  # type: ignore[arg-type]
            left = None if left is None else max(left - len(labels), 0)
    # A process without an image does not know how long features are; the others do.
    own = torch.tensor([found[0][1].shape[1], 1] if found else [0, 0])
    length, processes = sum_over_processes(trainer, module)(own).tolist()
    if not processes:
        raise InputError("the task has no image to take statistics of")
    if not found:
        empty = torch.zeros(0, length // processes)
        return Read(empty, empty, torch.zeros(0, dtype=torch.int64))
    return Read(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features and labels, if they are such, the labels as int64."""
    if features.ndim != 2 or not features.is_floating_point():
        raise InputError(
            f"image features are {list(features.shape)} of {features.dtype}; expected "
            "floating-point numbers [batch, features]"
        )
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != features.shape[:1] or not whole:
        raise InputError(
            f"labels are {list(labels.shape)} of {labels.dtype}, beside image features "
            f"{list(features.shape)}; expected whole numbers [batch]"
        )
    return features, labels.long()
