"""Consensus merging: of the sum of all tasks only what several tasks use."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import ResultInfo
from cl_merge.mergers.options import checked_count, checked_number
from cl_merge.mergers.stack import StackMerger
from cl_merge.mergers.task_arithmetic import TaskArithmetic


class Consensus(StackMerger):
    """Keep of the sum over tasks the elements that at least some number of tasks use.

    A task uses an element if its TALL mask has it: ``|τ_t| > λ |τ - τ_t|``, where τ is the sum over
    tasks. The others are set to zero. With fewer tasks than `least`, all must use an element.

    Args:
        threshold: λ, which the authors choose for each task on held-out data, from 0.2 to 0.6.
        least: Number of tasks that must use an element.

    Example:
        >>> import torch
        >>> merger = Consensus(threshold=0.5)
        >>> merger.update({"weight": torch.tensor([3.0, 4.0, 1.0])})
        >>> merger.update({"weight": torch.tensor([2.0, 0.1, -1.0])})
        >>> merger.merged()["weight"]
        tensor([5., 0., 0.])

    Reference:
        Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML
        2024, sections 4 and 5. Its scale is chosen on held-out data: here that of task arithmetic.
    """

    name = "consensus"
    published_scale = TaskArithmetic.published_scale

    def __init__(self, *, threshold: float = 0.4, least: int = 2) -> None:
        super().__init__()
        self.threshold = checked_number("threshold", threshold, 0, float("inf"))
        self.least = checked_count("least", least, 1)

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        # One after another: the order in which `sum` adds depends on the number of elements.
        total = torch.zeros_like(values[0])
        for vector in values:
            total += vector
        used = values.abs() > (total - values).abs_().mul_(self.threshold)
        return total.masked_fill_(used.sum(dim=0) < min(self.least, info.tasks), 0)
