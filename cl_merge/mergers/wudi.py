"""WUDI: the matrix that interferes least with what each task changed, in closed form."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo
from cl_merge.mergers.chunks import divide
from cl_merge.mergers.matrices import as_matrix, is_matrix, on_one_thread, solve_right
from cl_merge.mergers.options import checked_flag, checked_number


class Wudi(Merger):
    """Find the matrix that acts on the inputs of every task as the task's own matrix does.

    The rows of a task matrix τ_t [m, n] span about what the layer's inputs did in that task, so
    that the merged T shall be like τ_t there: it minimises the sum over tasks of
    ‖(T - τ_t) τ_tᵀ‖² / ‖τ_t‖². With G_t = τ_tᵀ τ_t / ‖τ_t‖² the minimum is
    T = (Σ τ_t G_t)(Σ G_t + ρ I)⁻¹: two sums, so that nothing of a single task is kept. Tasks that
    share no input direction are added up, equal ones stay one. No data are needed. Parameters that
    are no matrices are averaged, as in the authors' code.

    The authors walk towards this minimum in 300 short steps of Adam that begin at the sum of the
    task matrices; here it is reached, so that results differ where they stop on the way. Where
    tasks changed directions that are nearly the same, but into different ones, the minimum is
    large; a larger `ridge` holds it back.

    A matrix [m, n] takes 8 n² + 12 m n bytes, whatever the number of tasks: Σ G_t and Σ τ_t G_t
    are kept in float64, as sums of squares need it. A square one is as large as five task vectors.

    Args:
        ridge: ρ as a share of the mean eigenvalue of Σ G_t. Directions that tasks changed by less
            than its square root, compared with the others, fade out. It is of this library: the
            loss has none.
        flatten: Whether parameters of more than two dimensions, such as the kernels of
            convolutions, are matrices of one row for each output channel.

    Example:
        >>> merger = Wudi()
        >>> merger.update({"weight": torch.tensor([[2.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"weight": torch.tensor([[0.0, 0.0], [0.0, -4.0]])})
        >>> merger.merged()["weight"]
        tensor([[ 2.0000,  0.0000],
                [ 0.0000, -4.0000]])

    Reference:
        Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model
        Merging via Task Vectors, ICML 2025, whose loss it is. It is applied as it is: scale 1.
    """

    name = "wudi"
    published_scale = 1.0
    unit = "parameter"
    accumulators: ClassVar = {
        "sum": torch.float32,
        "weighted": torch.float64,  # Σ τ_t G_t, [m, n]
        "gram": torch.float64,  # Σ G_t, [n, n]
    }

    def __init__(self, *, ridge: float = 1e-6, flatten: bool = False) -> None:
        super().__init__()
        self.ridge = checked_number("ridge", ridge, 1e-10, 1)
        self.flatten = checked_flag("flatten", flatten)

    @override
    def accumulator_shape(self, key: str, shape: torch.Size) -> torch.Size:
        if key == "sum":
            return shape
        if not is_matrix(shape, self.flatten):
            return torch.Size([0])
        # All dimensions of the inputs twice: those of a kernel that grows stay the leading block.
        return shape if key == "weighted" else torch.Size([*shape[1:], *shape[1:]])

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state["sum"].add_(chunk)
        matrix = as_matrix(chunk.view(info.shape), self.flatten)
        if matrix is None:
            return
        with on_one_thread():
            matrix = matrix.double()
            length = matrix.square().sum()
            if length == 0:
                return
            gram = matrix.T @ matrix / length
            state["gram"].add_(gram.view(-1))
            state["weighted"].add_((matrix @ gram).view(-1))

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        if info.tasks == 1 or not is_matrix(info.shape, self.flatten):
            divide(state["sum"], info.tasks, out)
            return
        weighted = state["weighted"].view(info.shape[0], -1)
        columns = weighted.shape[1]
        gram = state["gram"].view(columns, columns)
        with on_one_thread():
            ridge = self.ridge * gram.trace() / columns
        if ridge == 0:  # no task changed it
            out.zero_()
        else:
            out.copy_(solve_right(gram, weighted, ridge).view(-1))
