"""A penalty on the drift that training causes to the features of earlier tasks' images."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.batches import training_batches
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.task_vectors.module_weights import evaluating

IMAGES = 200

Calls = dict[str, tuple[Tensor, Tensor]]
"""By layer, the input and the output of its last call."""


class DriftPenalty(Callback):
    r"""Keeps the features of earlier tasks' images where they were when the task began.

    To the loss comes, summed over layers, the penalty of TAK,

    .. math:: \lambda \operatorname{tr}(B \, \Delta W \, A \, \Delta W^T),

    with ΔW what the task has changed so far. A [n, n] is the mean over earlier tasks of the second
    moment of a layer's inputs, summed over the places of a convolution. B [out, out] is the sum
    over tasks of the second moment of the gradients of v·f at its outputs, the mean over places,
    for unit features f and v drawn from N(0, I): the penalty approximates λ times the squared
    change of the features, summed over tasks. TAK starts all tasks from the pre-trained weights
    and linearises the training; here a task starts where the last one ended.

    The module is changed: what is no matrix of a linear layer or convolution no longer trains.

    Args:
        module: What trains.
        weight: λ.
        seed: Seeds v.

    Reference:
        Porrello et al., Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored
        Approximate Curvature, ICLR 2026; convolutions: Grosse & Martens, ICML 2016.
    """

    def __init__(self, module: CLIPClassifier, weight: float, seed: int) -> None:
        module.requires_grad_(False)
        self.layers = {n: layer for n, layer in module.named_modules() if _has_factors(layer)}
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)
        self.inputs: dict[str, Tensor] = {}  # A, as a sum
        self.gradients: dict[str, Tensor] = {}  # B
        self._weight, self._tasks = weight, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._start: dict[str, Tensor] = {}

    @override
    def on_train_start(self, *_: Any) -> None:
        self._start = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @override
    def on_after_backward(self, *_: Any) -> None:
        for name, layer in self.layers.items() if self._tasks else ():
            change = (layer.weight.detach() - self._start[name]).flatten(1)
            slope = self.gradients[name] @ change @ self.inputs[name]
            gradient = slope.view_as(layer.weight)
            layer.weight.grad.add_(gradient, alpha=2 * self._weight / self._tasks)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CLIPClassifier)  # noqa: S101
        batches = (batch[0] for batch in training_batches(trainer, pl_module))
        self.remember(pl_module, batches)

    def remember(self, module: CLIPClassifier, batches: Iterable[Tensor]) -> None:
        """Take up a task: the factors of its first `IMAGES` images, [B, 3, H, W] a batch."""
        images = list(islice((image for batch in batches for image in batch), IMAGES))
        for part in torch.split(torch.stack(images), 32):
            for name, (inputs, gradients) in self._calls(module, part).items():
                a, b = _moments(self.layers[name], inputs, gradients)
                self.inputs[name] = self.inputs.get(name, 0) + a / len(images)
                self.gradients[name] = self.gradients.get(name, 0) + b / len(images)
        self._tasks += 1

    def _calls(self, module: CLIPClassifier, images: Tensor) -> Calls:
        """By layer, its inputs for images and the gradients of v·f at its outputs."""
        calls: Calls = {}

        def keep(name: str, _: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            calls[name] = given[0].detach(), output

        hooks = [
            layer.register_forward_hook(partial(keep, name)) for name, layer in self.layers.items()
        ]
        try:
            with torch.enable_grad(), evaluating(module):
                features = F.normalize(module.features(images), dim=-1)
                drawn = torch.randn(features.shape, generator=self._generator)
                outputs = [output for _, output in calls.values()]
                found = torch.autograd.grad((features * drawn.to(features)).sum(), outputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {n: (i, g) for (n, (i, _)), g in zip(calls.items(), found, strict=True)}


def _has_factors(layer: nn.Module) -> bool:
    # Subclasses, such as those that pad otherwise, may do something else with their inputs.
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _moments(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The second moments of inputs and of gradients at outputs, summed over a batch."""
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding
        assert not isinstance(padding, str)  # noqa: S101 - see _has_factors
        rows = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        inputs, gradients = rows.mT, gradients.flatten(2).mT  # [B, places, n], [B, places, out]
    places = gradients[0].numel() // gradients.shape[-1]
    inputs, gradients = inputs.flatten(0, -2), gradients.flatten(0, -2)
    return inputs.T @ inputs, gradients.T @ gradients / places
