"""Rules that need the values of all tasks at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo


class StackMerger(Merger):
    """A rule of all tasks at once, for what no sum or maximum over tasks can express.

    A subclass implements `combine`. Merging files takes memory for one chunk of each task; a
    `MergeCallback` keeps every task vector in memory.

    Example:
        >>> class Median(StackMerger):
        ...     name = "median"
        ...     published_scale = 1.0
        ...
        ...     def combine(self, values, info):
        ...         return values.median(dim=0).values
        >>> merger = Median()
        >>> for value in (1.0, 5.0, 2.0):
        ...     merger.update({"weight": torch.tensor([value])})
        >>> merger.merged()["weight"]
        tensor([2.])
    """

    @abstractmethod
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        """Merge one chunk.

        Args:
            values: The values of T task vectors in the order of the tasks, float32 ``[T, n]``, or
                ``[T, *shape]`` with ``unit = "parameter"``. May be changed.
            info: Which stretch this is.

        Returns:
            The merged values, floating point ``[n]`` or ``[*shape]``.
        """

    @override
    def new_accumulators(self, task: int) -> Mapping[str, torch.dtype]:
        return {_key(task): torch.float32}

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state[_key(info.task)].copy_(chunk)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        values = torch.stack([state[_key(task)] for task in range(info.tasks)])
        if self.unit == "parameter":
            values = values.view(info.tasks, *info.shape)
        out.copy_(self.combine(values, info).reshape(-1))


def _key(task: int) -> str:
    return f"task {task}"
