"""A quadratic model of the losses of the tasks so far, and the merging that minimises it."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_merge.callbacks.fisher import requiring_gradients, sample_fisher
from cl_merge.data.task_stream import TaskStream
from cl_merge.task_vectors.module_weights import evaluating

FISHER_SAMPLES = 200

Weights = Mapping[str, Tensor]
"""Values by parameter name."""


class LossModel:
    r"""What the loss of all tasks rises by, away from each task's own weights.

    .. math:: \tfrac12 \sum_i (\tau - \tau_i)^T H_i (\tau - \tau_i)

    for task vectors τ_i and diagonals H_i of the Fisher information at their weights. Two sums,
    of H_i and of H_i τ_i, hold all that is needed of it.
    """

    def __init__(self) -> None:
        self._curvature: dict[str, Tensor] = {}
        self._pull: dict[str, Tensor] = {}

    def update(self, vector: Weights, fisher: Weights) -> None:
        """Take up a task: its task vector, and a diagonal of the same names and shapes."""
        for name, value in vector.items():
            # In float64, since these are products of squares of gradients.
            curvature = fisher[name].double()
            self._curvature[name] = self._curvature.get(name, 0) + curvature
            self._pull[name] = self._pull.get(name, 0) + curvature * value.double()

    def step(self, start: Weights, direction: Weights) -> float:
        """The coefficient of a direction with which the loss, from a start, is least.

        It is 1 where the loss does not depend on it.
        """
        slope = bend = 0.0
        for name, value in direction.items():
            along, curvature = value.double(), self._curvature[name]
            slope += float((along * (self._pull[name] - curvature * start[name].double())).sum())
            bend += float((along * curvature * along).sum())
        return slope / bend if bend else 1.0


class PerturbAndMerge:
    """The merging of P&M: towards each new task's weights, as far as the loss model is least.

    Attributes:
        merged: The merged task vector.
        steps: How far it has gone at each task; 1 is all the way.

    Reference:
        Qiu et al., Train with Perturbation, Infer after Merging, NeurIPS 2025: the coefficient.
    """

    def __init__(self) -> None:
        self.merged: dict[str, Tensor] = {}
        self.steps: list[float] = []
        self._loss = LossModel()

    def update(self, vector: Weights, fisher: Weights) -> None:
        """Take up a task, as `LossModel.update`."""
        former = self.merged or {name: torch.zeros_like(value) for name, value in vector.items()}
        direction = {name: value - former[name] for name, value in vector.items()}
        self._loss.update(vector, fisher)
        self.steps.append(self._loss.step(former, direction))
        self.merged = {n: former[n] + self.steps[-1] * value for n, value in direction.items()}

    def items(self) -> ItemsView[str, Tensor]:
        """The merged task vector, by parameter name."""
        return self.merged.items()


def task_fisher(
    model: nn.Module, stream: TaskStream, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The diagonal Fisher of the current task at a model's weights, of some of its parameters.

    It is estimated from `FISHER_SAMPLES` training images, with labels drawn from the predictions.
    """
    classes = torch.tensor(stream.task.classes)

    def classify(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch[0], classes), (batch[1][:, None] == classes).int().argmax(dim=1)

    with evaluating(model), requiring_gradients(parameters):
        return sample_fisher(
            parameters,
            stream.train_dataloader(),
            classify,
            generator=torch.Generator().manual_seed(stream.task.index),
            limit=FISHER_SAMPLES,
        )
