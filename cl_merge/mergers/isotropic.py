"""Iso-C and Iso-CTS: what task matrices span, with one and the same strength in all directions."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ResultInfo
from cl_merge.mergers.matrices import (
    as_matrix,
    nearest_orthogonal,
    on_one_thread,
    singular_triplets,
)
from cl_merge.mergers.options import checked_flag, checked_number
from cl_merge.mergers.stack import StackMerger
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


class IsotropicTasks(StackMerger):
    """Give directions that tasks share and those that each has alone one and the same strength.

    Of the sum of the task matrices [m, n] the first k left singular vectors are what tasks share.
    What they leave of each of the T task matrices is decomposed by itself, and of each its first
    (min(m, n) - k) / T directions come to the k of the sum. Side by side, left and right vectors
    are replaced by the nearest orthonormal ones, U and V, and the result is mean(s) U Vᵀ, the mean
    taken over the singular values of all these directions. `Isotropic` keeps those of the sum
    alone, in which a direction of a single task is small. Parameters that are no matrices are
    averaged.

    The rest is shared out evenly: each task has round((min(m, n) - floor(common min(m, n))) / T)
    directions, at most what there is, and the sum has what remains. Directions of singular values
    that are zero play no part; rounding errors decide with which the authors' code fills them.

    Args:
        common: Share of the directions that those of the sum have, 0 to 1.
        flatten: As of `SingularVectors`.

    Example:
        >>> merger = IsotropicTasks(common=0.5)
        >>> merger.update({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"weight": torch.tensor([[3.0, 0.0], [0.0, -1.0]])})
        >>> merger.merged()["weight"] + 0.0
        tensor([[ 3.5000,  0.0000],
                [ 0.0000, -3.5000]])

    Reference:
        Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces, ICML 2025, "Iso-CTS", with its common share of 0.8; scale as of `Isotropic`.
    """

    name = "iso-cts"
    published_scale = 1.0
    unit = "parameter"

    def __init__(self, *, common: float = 0.8, flatten: bool = False) -> None:
        super().__init__()
        self.common = checked_number("common", common, 0, 1)
        self.flatten = checked_flag("flatten", flatten)

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        doubles = values.double()
        total = as_matrix(doubles.sum(dim=0), self.flatten)
        if total is None:
            return doubles.mean(dim=0)
        size = min(total.shape)
        each = round((size - int(size * self.common)) / len(values))
        each = min(each, size // len(values))
        left, strengths, right = singular_triplets(total)
        shared = size - each * len(values)
        kept = [(left[:, :shared], strengths[:shared], right[:shared])]
        for task in doubles.view(len(values), *total.shape) if each else ():
            with on_one_thread():
                alone = task - kept[0][0] @ (kept[0][0].T @ task)
            # What rounding leaves of a task that has nothing of its own is none of it.
            left, strengths, right = singular_triplets(alone)
            real = strengths[:each] > 1e-6 * torch.linalg.vector_norm(task)
            kept.append((left[:, :each][:, real], strengths[:each][real], right[:each][real]))
        lefts, values_of_all, rights = (list(part) for part in zip(*kept, strict=True))
        left = nearest_orthogonal(torch.cat(lefts, dim=1))
        right = nearest_orthogonal(torch.cat(rights))
        mean = torch.cat(values_of_all).sum() / size
        with on_one_thread():
            return (mean * (left @ right)).view(info.shape)
