"""Iso-C: the sum of the task matrices, with one and the same strength in all directions."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ResultInfo
from cl_merge.mergers.matrices import as_matrix, on_one_thread, singular_triplets
from cl_merge.mergers.options import checked_flag
from cl_merge.mergers.task_arithmetic import Average


class Isotropic(Average):
    """Sum the task matrices and replace all singular values by their mean.

    A sum of task vectors is dominated by the few directions that tasks share. With the sum
    U diag(s) Vᵀ of matrices [m, n], the result is mean(s) U Vᵀ, the mean taken over all min(m, n)
    singular values. Parameters that are no matrices are averaged, as in the authors' code.

    Directions that no task changed, those of singular values that are zero, stay as they are, where
    rounding errors decide with which vectors the authors' code fills them. It also averages text
    projections, by name; here every two-dimensional parameter is a matrix.

    Args:
        flatten: As of `SingularVectors`.

    Example:
        >>> merger = Isotropic()
        >>> merger.update({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"weight": torch.tensor([[0.0, 0.0], [0.0, -1.0]])})
        >>> merger.merged()["weight"] + 0.0
        tensor([[ 2.,  0.],
                [ 0., -2.]])

    Reference:
        Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces, ICML 2025, "Iso-C". Its authors choose the scale on held-out data; 1 is what
        FusionBench takes where there are no such data.
    """

    name = "iso-c"
    needs_base = True
    published_scale = 1.0
    unit = "parameter"

    def __init__(self, *, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = checked_flag("flatten", flatten)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        matrix = as_matrix(state["sum"].view(info.shape), self.flatten)
        if matrix is None:
            super().compute(state, out, info)
            return
        left, values, right = singular_triplets(matrix.double())
        mean = values.sum() / min(matrix.shape)
        with on_one_thread():
            out.copy_((mean * (left @ right)).view(-1))
