"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.kernels import Chunk, count_signs, elect, fold_signed, values_of
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, Reader, ResultInfo
from cl_merge.mergers.options import (
    checked_choice,
    checked_flag,
    checked_shares,
    checked_weights,
    of_task,
)
from cl_merge.mergers.threshold import threshold_of_largest, trim_threshold

Sign = Literal["value", "count", "none"]
"""What elects the sign of an element: the sum of its values, their number, or nothing."""

Combine = Literal["mean", "sum"]
"""What becomes of the values that have the elected sign."""

_COUNT = torch.int16
_WEIGHTS = ("positive_weight", "negative_weight")  # which the mean divides by, in place of counts


class SignElection(Merger):
    """Elect a sign per element, that of the sum over tasks, and average the values that have it.

    Elements whose sum is zero although they have values take the sign of the majority, that of the
    sum of all signs. A subclass decides which values of a task vector stand for election.

    Args:
        sign: As of `Ties`.
        combine: As of `Ties`.
        task_weights: As of `Ties`.

    Reference:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023,
        algorithm 1, steps 2 and 3; sign by count: peft's ``majority_sign_method="frequency"``.
    """

    accumulators: ClassVar = {
        "positive_sum": torch.float32,
        "negative_sum": torch.float32,
        "positive_count": _COUNT,
        "negative_count": _COUNT,
    }
    most_tasks: ClassVar[int] = torch.iinfo(_COUNT).max

    def __init__(
        self,
        *,
        sign: Sign = "value",
        combine: Combine = "mean",
        task_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.sign = checked_choice("sign", sign, get_args(Sign))
        self.combine = checked_choice("combine", combine, get_args(Combine))
        self.task_weights = checked_weights("task_weights", task_weights)

    @override
    def new_accumulators(self, task: int) -> Mapping[str, torch.dtype]:
        if task or self.task_weights is None:
            return super().new_accumulators(task)
        return {**self.accumulators, **dict.fromkeys(_WEIGHTS, torch.float32)}

    def stand(self, state: Accumulators, chunk: Chunk, task: int, threshold: float = 0.0) -> None:
        """Let values of a task vector whose magnitude reaches a threshold stand for election."""
        if task >= self.most_tasks:
            raise InputError(
                f"'{self.name}' counts up to {self.most_tasks} tasks; merge them in groups"
            )
        sums, counts = _by_sign(state)
        if self.task_weights is None:
            fold_signed(sums, counts, chunk, threshold)
            return
        weight = of_task("task_weights", self.task_weights, task)
        before = [count.clone() for count in counts]
        values = values_of(chunk)
        standing = torch.where(values.abs() >= threshold, values, 0).mul_(weight)
        fold_signed(sums, counts, standing, 0.0)
        for key, now, then in zip(_WEIGHTS, counts, before, strict=True):
            state[key].add_(now - then, alpha=weight)

    @override
    def global_count(self, state: Accumulators) -> tuple[int, bool]:
        sums, counts = _by_sign(state)
        return count_signs(sums, counts[0]) if self.sign == "value" else (0, False)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        sums, counts = _by_sign(state)
        majority = (info.global_count > 0) - (info.global_count < 0)
        if (self.sign, self.combine, self.task_weights) == ("value", "mean", None):
            elect(sums, counts, out, majority)
            return
        numbers = counts if self.task_weights is None else (state[_WEIGHTS[0]], state[_WEIGHTS[1]])
        if self.sign == "none":
            total, number = sums[0] + sums[1], numbers[0] + numbers[1]
        else:
            by_count = self.sign == "count"
            lead = counts[0] - counts[1] if by_count else sums[0] + sums[1]
            lead = torch.where(lead == 0, 1 if by_count else majority, lead)
            total = torch.where(lead > 0, *sums).masked_fill_(lead == 0, 0)
            number = torch.where(lead > 0, *numbers)
        if self.combine == "mean":
            total /= number.masked_fill(number == 0, 1)
        out.copy_(total)


class Ties(SignElection):
    """Trim each task vector, elect a sign per element, and average the values that agree with it.

    *Trim*: of each task vector only the values of largest magnitude stay, all those that reach its
    own k-th smallest magnitude over all parameters, k = d - floor(density * d). *Elect* and
    *merge* are those of ``SignElection``; 0 where no value has the elected sign.

    The density is that of what is given: the published runs trimmed whole CLIP models, in which the
    frozen text tower counts as zeros, so that their 20 % is 34.7 % of the image encoder.

    Args:
        density: Share of each task vector that stays, above 0 and up to 1; or a list, one for each
            task.
        per_parameter: Trim each parameter of a task vector by itself, as mergekit and peft do; the
            paper trims the whole task vector. Of d values the floor(density * d) largest stay then,
            but at least one, and all that are as large as the smallest of them.
        sign: What elects: ``"value"``, the sum of the values; ``"count"``, how many there are of
            each sign, positive where they are equally many, as peft does; ``"none"``, no election:
            all values count.
        combine: ``"mean"`` of the values that have the elected sign, or their ``"sum"``.
        task_weights: A factor of each task vector, in their order, by which its values are
            multiplied before the election. The mean then divides by the sum of the weights of
            those that it is of, as in mergekit. None for 1 each.

    Example:
        >>> merger = Ties(density=0.2)
        >>> merger.update({"weight": torch.tensor([4.0, 3.0, 1.0, -0.2, 0.1])})
        >>> merger.update({"weight": torch.tensor([2.0, -5.0, 0.3, 0.1, 0.2])})
        >>> merger.merged()["weight"]
        tensor([ 3., -5.,  0.,  0.,  0.])

    Reference:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023,
        section 3 and algorithm 1; scale from Marczak et al., MagMax, ECCV 2024.
    """

    name = "ties"
    published_scale = 0.55
    takes_differences = True

    def __init__(
        self,
        *,
        density: float | Sequence[float] = 0.2,
        per_parameter: bool = False,
        sign: Sign = "value",
        combine: Combine = "mean",
        task_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(sign=sign, combine=combine, task_weights=task_weights)
        self.density = checked_shares("density", density)
        self.per_parameter = checked_flag("per_parameter", per_parameter)

    @override
    def prepare(self, vector: Reader) -> Mapping[str, float]:
        """By parameter the magnitude from which values stay."""
        density = of_task("density", self.density, vector.task)
        if self.per_parameter:
            return {n: threshold_of_largest(vector.only(n), density) for n in vector.shapes}
        return dict.fromkeys(vector.shapes, trim_threshold(vector, density))

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        self.stand(state, chunk, info.task, info.prepared[info.name])


def _by_sign(state: Accumulators) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (
        (state["positive_sum"], state["negative_sum"]),
        (state["positive_count"], state["negative_count"]),
    )
