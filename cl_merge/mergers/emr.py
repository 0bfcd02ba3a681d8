"""EMR: the elected sign with the largest magnitude that has it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo


class Emr(Merger):
    """Elect a sign per element, that of the sum over tasks, and take the largest value that has it.

    This is the *elect* of the paper, its unified task vector, without the masks and rescalers of
    each task: they need to know the task. Elements whose sum is zero are zero.

    Example:
        >>> merger = Emr()
        >>> merger.update({"weight": torch.tensor([3.0, -1.0, 2.0])})
        >>> merger.update({"weight": torch.tensor([1.0, -4.0, -5.0])})
        >>> merger.merged()["weight"]
        tensor([ 3., -4., -5.])

    Reference:
        Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024,
        section 3. Without its rescalers there is no published scale.
    """

    name = "emr"
    published_scale = 1.0
    accumulators: ClassVar = {
        "sum": torch.float32,
        "largest": torch.float32,
        "smallest": torch.float32,
    }

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state["sum"].add_(chunk)
        torch.maximum(state["largest"], chunk, out=state["largest"])
        torch.minimum(state["smallest"], chunk, out=state["smallest"])

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        torch.where(state["sum"] > 0, state["largest"], state["smallest"], out=out)
        out.masked_fill_(state["sum"] == 0, 0)
