"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.kernels import Chunk, count_signs, elect, fold_signed
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, Reader, ResultInfo
from cl_merge.mergers.options import checked_flag, checked_share
from cl_merge.mergers.threshold import trim_threshold

_COUNT = torch.int16


class SignElection(Merger):
    """Elect a sign per element, that of the sum over tasks, and average the values that have it.

    Elements whose sum is zero although they have values take the sign of the majority, that of the
    sum of all signs. A subclass decides which values of a task vector stand for election.

    Reference:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023,
        algorithm 1, steps 2 and 3.
    """

    accumulators: ClassVar = {
        "positive_sum": torch.float32,
        "negative_sum": torch.float32,
        "positive_count": _COUNT,
        "negative_count": _COUNT,
    }
    most_tasks: ClassVar[int] = torch.iinfo(_COUNT).max

    def stand(self, state: Accumulators, chunk: Chunk, task: int, threshold: float = 0.0) -> None:
        """Let values of a task vector whose magnitude reaches a threshold stand for election."""
        if task >= self.most_tasks:
            raise InputError(
                f"'{self.name}' counts up to {self.most_tasks} tasks; merge them in groups"
            )
        fold_signed(*_by_sign(state), chunk, threshold)

    @override
    def global_count(self, state: Accumulators) -> tuple[int, bool]:
        sums, counts = _by_sign(state)
        return count_signs(sums, counts[0])

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        majority = (info.global_count > 0) - (info.global_count < 0)
        elect(*_by_sign(state), out, majority)


class Ties(SignElection):
    """Trim each task vector, elect a sign per element, and average the values that agree with it.

    *Trim*: of each task vector only the values of largest magnitude stay, all those that reach its
    own k-th smallest magnitude over all parameters, k = d - floor(density * d). *Elect* and
    *merge* are those of ``SignElection``; 0 where no value has the elected sign.

    The density is that of what is given: the published runs trimmed whole CLIP models, in which the
    frozen text tower counts as zeros, so that their 20 % is 34.7 % of the image encoder.

    Args:
        density: Share of each task vector that stays, above 0 and up to 1.
        per_parameter: Trim each parameter of a task vector by itself, as mergekit and peft do; the
            paper trims the whole task vector. With it, equal weights and scale 1 the result is
            theirs, but where magnitudes at the threshold are equal.

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

    def __init__(self, *, density: float = 0.2, per_parameter: bool = False) -> None:
        super().__init__()
        self.density = checked_share("density", density)
        self.per_parameter = checked_flag("per_parameter", per_parameter)

    @override
    def prepare(self, vector: Reader) -> Mapping[str, float]:
        """By parameter the magnitude from which values stay."""
        if self.per_parameter:
            return {n: trim_threshold(vector.only(n), self.density) for n in vector.shapes}
        return dict.fromkeys(vector.shapes, trim_threshold(vector, self.density))

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        self.stand(state, chunk, info.task, info.prepared[info.name])


def _by_sign(state: Accumulators) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (
        (state["positive_sum"], state["negative_sum"]),
        (state["positive_count"], state["negative_count"]),
    )
