"""How far a change of weights moves the features of images seen before, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.callbacks.second_moments import SecondMoments
from cl_merge.task_vectors.growth import grown, leading
from cl_merge.task_vectors.module_weights import (
    copies,
    dense_gradient,
    parameters_of,
    trained_parameters,
)


class FeatureDrift:
    r"""The squared change of the unit features of earlier tasks' images, to second order.

    For the change ΔW of a linear layer's or convolution's weight, as a matrix, it is
    :math:`\operatorname{tr}(B \, ΔW A \, ΔW^T)`, with A the mean over tasks of the second moment of
    the layer's inputs, and B the sum over tasks of that of the gradients at its outputs. For any
    other parameter p it is :math:`\sum D \, Δp^2`, with D the sum over tasks of the second moment
    of its gradient; all as in `SecondMoments`.

    Attributes:
        inputs: A times the number of tasks, by the name of the weight, [n, n].
        counts: That number, by the name of the weight.
        gradients: B, by the name of the weight, [out, out].
        elements: D, by the name of the parameter, in its shape.
        anchor: The weights that changes are counted from, by name.

    Reference:
        Martens & Grosse, Optimizing Neural Networks with Kronecker-Factored Approximate Curvature,
        ICML 2015; convolutions: Grosse & Martens, ICML 2016.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.gradients: dict[str, Tensor] = {}
        self.elements: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train, and those that a task before has trained, frozen or not."""
        trained, live = trained_parameters(module), parameters_of(module)
        return {name: p for name, p in live.items() if name in trained or self._holds(name)}

    def start(self, module: nn.Module) -> None:
        """Count changes from the weights that a module holds."""
        live = parameters_of(module)
        self.anchor = copies({name: p for name, p in live.items() if self._holds(name)})

    @torch.no_grad()
    def add_gradients(self, module: nn.Module, weight: float) -> Tensor | None:
        """Add the gradient of the drift, times a weight, to those of a module's parameters.

        Returns:
            The drift, a scalar; None where nothing is held.
        """
        terms = []
        for name, parameter in trained_parameters(module).items():
            if (anchor := self.anchor.get(name)) is None:
                continue
            change = self._former(name, parameter) - self._former(name, anchor)
            slope = self._slope(name, change)
            leading(dense_gradient(parameter), slope.shape).add_(slope, alpha=2 * weight)
            terms.append((change * slope).sum())
        return torch.stack(terms).sum() if terms else None

    def end_task(self, task: SecondMoments) -> None:
        """Take up the moments of a task that ended, which may be changed."""
        for mine, moments in zip((self.inputs, self.gradients, self.elements), task, strict=True):
            for name, new in moments.items():
                before = mine.get(name)
                mine[name] = new if before is None else new.add_(grown(before, None, new.shape))
        for name in task.inputs:
            self.counts[name] = self.counts.get(name, 0) + 1

    def move_to(self, device: torch.device) -> None:
        """Move all that is kept to a device."""
        for tensors in (self.inputs, self.gradients, self.elements, self.anchor):
            tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as live tensors and numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; its tensors are copied."""
        for name in vars(self):
            setattr(self, name, dict(state[name]) if name == "counts" else copies(state[name]))

    def _holds(self, name: str) -> bool:
        return name in self.inputs or name in self.elements

    def _former(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a parameter that there was in earlier tasks, in the dtype of the moments."""
        if name in self.elements:
            shape, kept = self.elements[name].shape, self.elements[name]
        else:
            kept, kernel = self.inputs[name], tensor.shape[2:]
            shape = torch.Size((len(self.gradients[name]), len(kept) // math.prod(kernel), *kernel))
        return leading(tensor, shape).to(kept.dtype)

    def _slope(self, name: str, change: Tensor) -> Tensor:
        """Half the gradient of the drift."""
        if name in self.elements:
            return self.elements[name] * change
        slope: Tensor = self.gradients[name] @ change.flatten(1) @ self.inputs[name]
        return slope.div_(self.counts[name]).view_as(change)
