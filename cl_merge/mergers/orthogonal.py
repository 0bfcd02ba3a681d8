"""OPCM: of each new task only what is orthogonal to what was merged before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, Reader, ResultInfo
from cl_merge.mergers.matrices import as_matrix, on_one_thread, singular_triplets
from cl_merge.mergers.options import checked_flag, checked_number

_UNIT = 1 << 1074
"""Every float64 is a whole multiple of 1 / `_UNIT`."""


class OrthogonalProjection(Merger):
    """Add of each task only what is orthogonal to the sum before it, and keep the length steady.

    A task matrix is written in the singular vectors u_i, v_i of the sum of the tasks before it, as
    entries uᵢᵀ M vⱼ. Left out are those with i = j, which only stretch what is there, and those
    with both i and j among the main directions, the first ones whose singular values make up at
    most the share `alpha` of the sum of all. The rest is added, as are parameters that are no
    matrices. In the end the merged vector is scaled to the mean length of the task vectors.

    The published recursion divides by λ(t) after every task and multiplies by it before the next:
    as singular vectors and shares do not depend on scale, dividing once in the end is the same. The
    projection is that of the authors' code, in FusionBench, but: its matrices are the weights of
    linear layers, here every two-dimensional parameter is one (an embedding too); directions that
    no task has changed yet, of singular values that are zero in float32, exclude nothing, whereas
    there rounding errors decide what they exclude; and with alpha = 1 all directions are main ones,
    where the code takes none to be.

    The order of the tasks matters. Where singular values are equal, rounding errors decide.

    Args:
        alpha: Share of the singular values within which new tasks may change nothing, 0 to 1.
        flatten: Whether parameters of more than two dimensions, such as the kernels of
            convolutions, are matrices of one row for each output channel. The authors add them as
            they are.

    Example:
        >>> merger = OrthogonalProjection(alpha=0.5)
        >>> merger.update({"weight": torch.tensor([[4.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"weight": torch.tensor([[2.0, 0.0], [0.0, 4.0]])})
        >>> merger.merged()["weight"] + 0.0
        tensor([[2.9954, 0.0000],
                [0.0000, 2.9954]])

    Reference:
        Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable
        Continual Model Merging, NeurIPS 2025; alpha from the configuration of the authors' code.
        The scale is within the method: λ(t).
    """

    name = "opcm"
    published_scale = 1.0
    # `length` holds one number per task vector, the same everywhere: the sum of all their lengths.
    accumulators: ClassVar = {"sum": torch.float32, "length": torch.float32}
    unit = "parameter"

    def __init__(self, *, alpha: float = 0.5, flatten: bool = False) -> None:
        super().__init__()
        self.alpha = checked_number("alpha", alpha, 0, 1)
        self.flatten = checked_flag("flatten", flatten)

    @override
    def prepare(self, vector: Reader) -> float:
        # Whole parameters, and a sum that is exact but for its last rounding: neither the size of
        # chunks nor the order of parameters changes a bit.
        return math.sqrt(math.fsum(vector.map(_sum_of_squares, "parameter")))

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state["length"].add_(info.prepared)
        merged = as_matrix(state["sum"].view(info.shape), self.flatten)
        if merged is None or info.task == 0:
            state["sum"].add_(chunk)
            return
        task = chunk.view(merged.shape).double()
        left, values, right = singular_triplets(merged)
        shares = values.cumsum(0) / values.sum()
        main = int((shares <= self.alpha).count_nonzero()) if self.alpha < 1 else len(values)
        with on_one_thread():
            entries = left.T @ task @ right.T
            excluded = torch.eye(len(entries), dtype=torch.bool, device=entries.device)
            excluded[:main, :main] = True
            remaining = task - left @ (entries * excluded) @ right
        state["sum"].add_(remaining.view(-1))

    @override
    def fold_absent(self, state: Accumulators, prepared: float) -> None:
        state["length"].add_(prepared)

    @override
    def grow(self, shapes: Mapping[str, torch.Size]) -> bool:
        has_grown = super().grow(shapes)
        if has_grown:  # what joins has the lengths of the tasks before, too
            held = [state["length"] for state in self._state.values()]
            found = [float(length.flatten()[0]) for length in held if length.numel()]
            every = found if self.shards is None else self.shards.everywhere(found)
            for length in held:
                length.fill_(max(every, default=0.0))
        return has_grown

    @override
    def global_count(self, state: Accumulators) -> tuple[int, bool]:
        above, below = _sum_of_squares(state["sum"]).as_integer_ratio()
        return above * (_UNIT // below), True

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        if info.tasks == 1:
            out.copy_(state["sum"])
            return
        length = math.sqrt(info.global_count / _UNIT)
        mean = float(state["length"][0]) / info.tasks
        torch.mul(state["sum"], mean / length if length > 0 else 0.0, out=out)


def _sum_of_squares(values: Tensor) -> float:
    with on_one_thread():
        return float(values.double().square().sum())
