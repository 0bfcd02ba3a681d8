"""Average: the mean of the task vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ResultInfo
from cl_merge.mergers.task_arithmetic import TaskArithmetic


class Average(TaskArithmetic):
    """Take the mean over tasks.

    Example:
        >>> merger = Average()
        >>> merger.update({"weight": torch.tensor([3.0, -1.0])})
        >>> merger.update({"weight": torch.tensor([1.0, -4.0])})
        >>> merger.merged()["weight"]
        tensor([ 2.0000, -2.5000])

    Reference:
        Wortsman et al., Model Soups, ICML 2022, section 2 (the uniform soup); "Avg" in Marczak et
        al., MagMax, ECCV 2024.
    """

    name = "average"
    published_scale = 1.0

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        # By a number CUDA does not divide: it multiplies by the reciprocal, which rounds twice.
        torch.div(state["sum"], torch.full_like(state["sum"][:1], info.tasks), out=out)
