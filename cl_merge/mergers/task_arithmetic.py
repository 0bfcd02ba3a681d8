"""Task arithmetic and average: the sum and the mean of the task vectors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.kernels import fold_sum
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo
from cl_merge.mergers.chunks import divide


class TaskArithmetic(Merger):
    """Take the sum over tasks.

    Its authors choose the scale on held-out data and find 0.3 to 0.5 close to the best in many
    cases; 0.4 is what Yadav et al. take for it where there are no such data.

    Example:
        >>> merger = TaskArithmetic()
        >>> merger.update({"weight": torch.tensor([3.0, -1.0])})
        >>> merger.update({"weight": torch.tensor([1.0, -4.0])})
        >>> merger.merged()["weight"]
        tensor([ 4., -5.])

    Reference:
        Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, section 4; scale:
        Yadav et al., TIES-Merging, NeurIPS 2023.
    """

    name = "task-arithmetic"
    published_scale = 0.4
    takes_differences = True
    accumulators: ClassVar = {"sum": torch.float32}

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        fold_sum(state["sum"], chunk)


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
    needs_base = False

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        divide(state["sum"], info.tasks, out)
