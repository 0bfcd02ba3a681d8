"""What a model's outputs mean: the loss that they are trained with tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_merge.errors import InputError, unknown_name

Loss: TypeAlias = Literal["cross_entropy", "binary_cross_entropy", "mse"]

# Added to the new probabilities, divided by their number, as in the published runs.
_FLOOR = 1e-5


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Cross entropy between softened outputs of an old and a new model.

    With q and p the softmax of the teacher's and of the student's logits over `temperature`, the
    mean over the batch of ``-sum_k q_k log(p_k + 1e-5 / K)``. There is no factor of the squared
    temperature: this is the form of the published runs.

    Args:
        student: Logits of the new model, float [B, K].
        teacher: Logits of the old model, float [B, K].
        temperature: By what both are divided.

    Returns:
        A scalar, in nats.

    Example:
        >>> even = torch.zeros(1, 2)
        >>> round(float(distillation(even, even)), 3)
        0.693

    Reference:
        Li & Hoiem, Learning without Forgetting, ECCV 2016, equation 2.
    """
    new = F.softmax(student / temperature, dim=1)
    old = F.softmax(teacher / temperature, dim=1)
    return -(old * torch.log(new + _FLOOR / new.shape[1])).sum(dim=1).mean()


@dataclass(frozen=True)
class Outputs:
    """How outputs [B, K] of a model are read.

    Attributes:
        likelihood: Negative log likelihood of targets under outputs, summed over the batch.
        draw: Draws targets from what outputs predict, on the CPU, with a generator.
        distil: Loss of a student's outputs towards a teacher's, at a temperature; a scalar.
    """

    likelihood: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Tensor, torch.Generator], Tensor]
    distil: Callable[[Tensor, Tensor, float], Tensor]


def _draw_class(outputs: Tensor, generator: torch.Generator) -> Tensor:
    odds = outputs.softmax(dim=1).movedim(1, -1)  # there may be one for each pixel
    drawn = torch.multinomial(odds.flatten(0, -2), 1, generator=generator)
    return drawn.view(odds.shape[:-1])


def _binary_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    targets = targets.to(outputs.dtype).view_as(outputs)
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def _binary_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    old = (teacher / temperature).sigmoid()
    return F.binary_cross_entropy_with_logits(student / temperature, old)


OUTPUTS: dict[str, Outputs] = {
    "cross_entropy": Outputs(
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum"),
        _draw_class,
        distillation,
    ),
    # Bernoulli labels, one for each output.
    "binary_cross_entropy": Outputs(
        _binary_likelihood,
        lambda outputs, generator: torch.bernoulli(outputs.sigmoid(), generator=generator),
        _binary_distillation,
    ),
    # Numbers with normal noise of variance 1.
    "mse": Outputs(
        lambda outputs, targets: 0.5 * (outputs - targets.view_as(outputs)).square().sum(),
        lambda outputs, generator: outputs + torch.randn(outputs.shape, generator=generator),
        lambda student, teacher, _: F.mse_loss(student, teacher),
    ),
}
"""By the name of the loss."""


def check_loss(loss: str | None) -> None:
    """Make sure that a loss is a known one, or None."""
    if loss is not None and loss not in OUTPUTS:
        raise unknown_name("loss", loss, OUTPUTS)


def outputs_of(loss: str | None) -> Outputs:
    """How outputs trained with a loss are read; None is cross entropy."""
    return OUTPUTS[loss or "cross_entropy"]


def check_classes(outputs: Tensor, targets: Tensor | None, loss: str | None, asking: str) -> None:
    """Refuse outputs that a softmax makes no sense of, unless the loss was said."""
    if loss is not None:
        return
    number = "one output" if outputs.ndim < 2 or outputs.shape[1] == 1 else None
    if targets is not None and targets.is_floating_point():
        number = "a target that is no class"
    if number is not None:
        raise InputError(
            f"{asking} takes outputs {list(outputs.shape)} for logits of classes, but there is "
            f"{number}; say what they are trained with: {asking}(loss='binary_cross_entropy') or "
            "loss='mse'"
        )
