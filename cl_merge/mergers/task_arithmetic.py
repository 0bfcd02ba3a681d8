"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.kernels import fold_sum
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, takes_differences


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
    accumulators: ClassVar = {"sum": torch.float32}

    @override
    @takes_differences
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        fold_sum(state["sum"], chunk)
