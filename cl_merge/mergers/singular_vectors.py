"""TSV-M: the main singular vectors of every task, made orthogonal to those of the others."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import ResultInfo
from cl_merge.mergers.matrices import (
    as_matrix,
    nearest_orthogonal,
    on_one_thread,
    singular_triplets,
)
from cl_merge.mergers.options import checked_flag
from cl_merge.mergers.stack import StackMerger


class SingularVectors(StackMerger):
    """Keep the main singular vectors of each task, and make those of different tasks orthogonal.

    Of each of the T task matrices [m, n] only the largest k = floor(min(m, n) / T) singular values
    and their vectors stay. Side by side they make U [m, T k], s and V [n, T k]. The orthonormal
    matrices nearest to U and to V replace them, which takes the interference between tasks away,
    and the result is U diag(s) Vᵀ. Parameters that are no matrices are averaged.

    Directions that a task did not change, those of singular values that are zero, play no part;
    rounding errors decide with which vectors the authors' code fills them. Where there are more
    tasks than min(m, n), k is 1; the authors' code would return zeros. It also averages text
    projections, by name; here every two-dimensional parameter is a matrix.

    Args:
        flatten: Whether parameters of more than two dimensions, such as the kernels of
            convolutions, are matrices of one row for each output channel. The authors average them.

    Example:
        >>> merger = SingularVectors()
        >>> merger.update({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])})
        >>> merger.update({"weight": torch.tensor([[0.1, 0.0], [0.0, 2.0]])})
        >>> merger.merged()["weight"] + 0.0
        tensor([[3., 0.],
                [0., 2.]])

    Reference:
        Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR
        2025, "TSV-Merge". The authors' code chooses the scale on held-out data; 1 is what
        FusionBench takes where there are no such data.
    """

    name = "tsv"
    published_scale = 1.0
    unit = "parameter"

    def __init__(self, *, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = checked_flag("flatten", flatten)

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        if len(values) == 1:
            return values[0]
        matrices = [as_matrix(value, self.flatten) for value in values.double()]
        tasks = [singular_triplets(matrix) for matrix in matrices if matrix is not None]
        if not tasks:
            return values.double().mean(dim=0)
        rows, columns = tasks[0][0].shape[0], tasks[0][2].shape[1]
        rank = max(min(rows, columns) // len(tasks), 1)
        left = nearest_orthogonal(torch.cat([left[:, :rank] for left, _, _ in tasks], dim=1))
        right = nearest_orthogonal(torch.cat([right[:rank] for _, _, right in tasks]))
        strengths = torch.cat([strengths[:rank] for _, strengths, _ in tasks])
        with on_one_thread():
            return ((left * strengths) @ right).view(info.shape)
