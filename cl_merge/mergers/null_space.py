"""NUFILT's projector: of each new task what does not touch the main inputs of those before it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo
from cl_merge.mergers.chunks import divide
from cl_merge.mergers.matrices import as_matrix, is_matrix, on_one_thread, singular_triplets
from cl_merge.mergers.options import checked_count, checked_flag


class NullSpaceFilter(Merger):
    """Add of each task matrix what acts on other inputs than the sum of the tasks before it.

    With V̂ [n, k] the main right singular vectors of that sum [m, n], those of its k largest
    singular values, a task matrix τ [m, n] is added as τ (I - V̂ V̂ᵀ): for inputs in the span of V̂
    the layer does what it did before the task. Directions that no task changed yet, of singular
    values that are zero in float32, filter nothing, so that the first task is added whole.
    Parameters that are no matrices are averaged.

    This is the projector of NUFILT alone, without the low-rank correction that its authors train
    after it, on a loss of the weights. Their code merges the weights of the attention and of the
    first layer of each perceptron, and leaves all others as they were before any task; ``include``
    and ``exclude`` of a callback or of a merge can do the same. It also filters the first task, by
    vectors that rounding errors choose.

    The order of the tasks matters. Where singular values are equal, rounding errors decide.

    Args:
        rank: k, the number of directions of the tasks before that a new one may not change.
        flatten: As of `SingularVectors`. The authors' code leaves kernels as they are.

    Example:
        >>> merger = NullSpaceFilter(rank=1)
        >>> merger.update({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"weight": torch.tensor([[1.0, 2.0], [4.0, 5.0]])})
        >>> merger.merged()["weight"] + 0.0
        tensor([[3., 2.],
                [0., 5.]])

    Reference:
        Qiu et al., Null-Space Filtering for Data-Free Continual Model Merging, ICLR 2026; the rank
        from the configuration of the authors' code, for ViT-B. It adds the filtered task vectors as
        they are: scale 1.
    """

    name = "nufilt"
    published_scale = 1.0
    unit = "parameter"
    accumulators: ClassVar = {"sum": torch.float32}

    def __init__(self, *, rank: int = 128, flatten: bool = False) -> None:
        super().__init__()
        self.rank = checked_count("rank", rank, 1)
        self.flatten = checked_flag("flatten", flatten)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        merged = as_matrix(state["sum"].view(info.shape), self.flatten)
        if merged is None or info.task == 0:
            state["sum"].add_(chunk)
            return
        _, _, right = singular_triplets(merged)
        right = right[: self.rank]
        with on_one_thread():
            task = chunk.view(merged.shape).double()
            state["sum"].add_((task - (task @ right.T) @ right).view(-1))

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        divide(state["sum"], 1 if is_matrix(info.shape, self.flatten) else info.tasks, out)
