"""Image features of a task's images, under whatever weights a module holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_merge.callbacks.batches import own_samples, placed, training_batches
from cl_merge.errors import InputError
from cl_merge.statistics import unit

Features = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""Makes image features [B, D] and labels [B] of a module and a batch."""


class Read(NamedTuple):
    """What one process has read of a task's images, on the CPU.

    Attributes:
        base: Unit features under the base weights, float32 [N, D]; [0, 0] if there was no image.
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
    if not callable(getattr(module, "features", None)):
        raise InputError(
            f"{type(module).__name__} has no method features(images); give "
            "ClassStatistics(features=...), a function of module and batch that returns image "
            "features [batch, features] and labels [batch]"
        )
    try:
        images, labels = batch[0], batch[1]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"cannot tell images from labels in a batch of type {type(batch).__name__}; give "
            "ClassStatistics(features=...), a function of module and batch that returns image "
            "features [batch, features] and labels [batch]"
        ) from error
    return module.features(images), labels


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
            live, labels = features(module, batch)
            read = (unit(before.read(batch) if base else live), unit(live), labels)
            found.append(tuple(tensor[:left].cpu() for tensor in read))  # type: ignore[arg-type]
            left = None if left is None else max(left - len(labels), 0)
    if not found:
        empty = torch.zeros(0, 0)
        return Read(empty, empty, torch.zeros(0, dtype=torch.int64))
    return Read(*(torch.cat(parts) for parts in zip(*found, strict=True)))
