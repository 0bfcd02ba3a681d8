"""Fisher-weighted average: each task counts where it matters to it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo


class FisherAverage(Merger):
    """Take the mean over tasks, each element weighted with its importance to the task.

    The importance F_t is the diagonal of the Fisher information at the end of the task: the sum of
    F_t τ_t is divided by the sum of F_t. Where that is zero it is the plain mean.

    Example:
        >>> merger = FisherAverage()
        >>> merger.update({"weight": torch.tensor([2.0])}, {"weight": torch.tensor([3.0])})
        >>> merger.update({"weight": torch.tensor([6.0])}, {"weight": torch.tensor([1.0])})
        >>> merger.merged()["weight"]
        tensor([3.])

    Reference:
        Matena & Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, equation 4.
    """

    name = "fisher"
    published_scale = 1.0
    weighted = True
    needs_base = False
    # In float64: importances are squares of gradients, and their products leave float32's range.
    accumulators: ClassVar = {
        "weighted_sum": torch.float64,
        "importance": torch.float64,
        "sum": torch.float32,
    }

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        assert info.importance is not None  # noqa: S101 - the driver has checked it
        importance = info.importance.to(torch.float64)
        state["importance"].add_(importance)
        state["weighted_sum"].addcmul_(importance, chunk.to(torch.float64))
        state["sum"].add_(chunk)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        nowhere = state["importance"] == 0
        mean = state["weighted_sum"] / state["importance"].masked_fill(nowhere, 1)
        out.copy_(torch.where(nowhere, state["sum"].to(torch.float64) / info.tasks, mean))
