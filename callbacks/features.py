"""Image features of a task's images, under two sets of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_merge.callbacks.batches import (
    inputs_and_targets,
    own_samples,
    pairs_of,
    sum_over_processes,
    to_module,
    training_batches,
    wrong_result,
)
from cl_merge.class_statistics import unit
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import with_names_of

Features = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""Makes image features [B, D] and labels [B] of a module and a batch."""

ImageFeatures = Callable[[Any, Any], Tensor]
"""Makes image features [B, D] of a module and a batch."""


def give_features(argument: str) -> str:
    """Say what to give where a module has no features of its own."""
    return (
        f"{argument}, a function of module and batch that returns image features [batch, features]"
    )


_GIVE = f"{give_features('ClassStatistics(features=...)')} and labels [batch]"


class TaskFeatures(NamedTuple):
    """What one process has read of a task's images, on the CPU; N may be 0."""

    base: Tensor  # unit features under the base weights, float32 [N, D]
    merged: Tensor  # the same under the weights that the module holds
    labels: Tensor  # int64 [N]


def features_of(given: Features | None) -> Features:
    """The function that was given to `ClassStatistics`, or else the module's own features."""
    return pairs_of(given, _GIVE) if given else own_features


def own_features(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The features of a batch of images and labels by the module's own method ``features``."""
    check_own_features(module, _GIVE)
    images, labels = inputs_and_targets(batch, asking="ClassStatistics", give=_GIVE)
    return module.features(images), labels


def check_own_features(module: Any, give: str = _GIVE) -> None:
    """Raise `InputError` if a module has no method ``features``; it says what to give instead."""
    if not callable(getattr(module, "features", None)):
        raise InputError(f"{type(module).__name__} has no method features(images); give {give}")


def image_features_of(given: ImageFeatures | None, asking: str, argument: str) -> ImageFeatures:
    """The function that was given to a callback as an argument, or else the module's own one."""
    give = give_features(argument)
    if given is None:
        return partial(_image_features, asking=asking, give=give)
    return partial(_one_tensor, given, give)


def _one_tensor(given: ImageFeatures, give: str, module: Any, batch: Any) -> Tensor:
    found: Any = given(module, batch)
    if isinstance(found, Tensor):
        return found
    raise wrong_result(found, give)


def _image_features(module: Any, batch: Any, *, asking: str, give: str) -> Tensor:
    check_own_features(module, give)
    images, _ = inputs_and_targets(batch, asking=asking, give=give)
    found: Tensor = module.features(images)
    return found


def features_under(
    weights: Mapping[str, Tensor], module: nn.Module, features: Features, batch: Any
) -> Tensor:
    """Features of a batch, [B, D], under other weights than the module holds, which stay there.

    The weights are parameters and buffers by name, on the module's device.
    """
    here = with_names_of(module, weights)
    renamed = {f"module.{name}": tensor for name, tensor in here.items()}
    found: Tensor = functional_call(_FeaturesOf(module, features), renamed, (batch,))
    return found


@torch.no_grad()
def read_features(
    trainer: L.Trainer,
    module: L.LightningModule,
    features: Features,
    base: Mapping[str, Tensor],
    batches: Iterable[Any] | None,
) -> TaskFeatures:
    """Read features once over a task's images, under two sets of weights and the same precision.

    The base holds weights and buffers by name on the module's device; it is empty if the module
    holds them. The batches have each image exactly once over all processes; None takes one more
    epoch over the training data.
    """
    left = None
    if batches is None:
        left, batches = own_samples(trainer), training_batches(trainer, module)
    else:
        batches = (to_module(trainer, module, batch) for batch in batches)
    parts: list[tuple[Tensor, ...]] = []
    with trainer.precision_plugin.forward_context():
        for batch in batches:
            merged, labels = _checked(*features(module, batch))
            before = features_under(base, module, features, batch) if base else merged
            read = (unit(before), unit(merged), labels)
            parts.append(tuple(tensor[:left].cpu() for tensor in read))
            left = None if left is None else max(left - len(labels), 0)
    # A process without an image does not know how long features are; the others do.
    own = torch.tensor([parts[0][1].shape[1], 1] if parts else [0, 0])
    length, processes = sum_over_processes(trainer, module)(own).tolist()
    if not processes:
        raise InputError("the task has no image to take statistics of")
    if not parts:
        empty = torch.zeros(0, length // processes)
        return TaskFeatures(empty, empty, torch.zeros(0, dtype=torch.int64))
    return TaskFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class _FeaturesOf(nn.Module):
    """A module's features as a forward, which is what can be called with other weights."""

    def __init__(self, module: nn.Module, features: Features) -> None:
        super().__init__()
        self.module = module
        self._features = features

    def forward(self, batch: Any) -> Tensor:
        return self._features(self.module, batch)[0]


def _checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features and labels, if they are such, the labels as int64."""
    if features.ndim != 2 or not features.is_floating_point():
        raise InputError(
            f"image features are {list(features.shape)} of {features.dtype}; expected "
            "floating-point numbers [batch, features]"
        )
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != features.shape[:1] or not integers:
        raise InputError(
            f"labels are {list(labels.shape)} of {labels.dtype}, beside image features "
            f"{list(features.shape)}; expected whole numbers [batch]"
        )
    return features, labels.long()
