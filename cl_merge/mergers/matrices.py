"""What rules on weight matrices share: which parameters are matrices, and their decompositions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A singular value that is no larger, as a share of the Frobenius norm, is zero: task vectors are
# float32, whose rounding errors reach about 1e-7 of it, whatever dtype a rule computes in. What
# `torch.linalg.matrix_rank` leaves out of a float32 matrix grows with its size, to 5e-4.
_ZERO = 1e-6


def as_matrix(values: Tensor, flatten: bool) -> Tensor | None:
    """View a parameter as a matrix [rows, columns]; None if it is none or holds nothing.

    With `flatten`, what has more than two dimensions is one too, of a row for each output channel.
    """
    return values.reshape(values.shape[0], -1) if is_matrix(values.shape, flatten) else None


def is_matrix(shape: torch.Size, flatten: bool) -> bool:
    """Whether `as_matrix` makes a matrix of a parameter of this shape."""
    return shape.numel() > 0 and (len(shape) == 2 or (len(shape) > 2 and flatten))


def singular_triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix, and leave out what belongs to singular values of zero.

    Which vectors belong to a singular value of zero is up to rounding errors, so that no rule may
    depend on them. Of a matrix [m, n] of rank r, as far as float32 tells, returns left vectors
    [m, r], descending singular values [r] and right vectors [r, n], in float64.
    """
    with on_one_thread():
        double = matrix.double()
        if double.shape[0] < double.shape[1]:  # LAPACK is faster on tall matrices
            right, values, left = torch.linalg.svd(double.T, full_matrices=False)
            left, right = left.T, right.T
        else:
            left, values, right = torch.linalg.svd(double, full_matrices=False)
    rank = int((values > _ZERO * torch.linalg.vector_norm(double)).count_nonzero())
    return left[:, :rank], values[:rank], right[:rank]


def solve_right(gram: Tensor, known: Tensor, ridge: float | Tensor) -> Tensor:
    """Solve T (G + ρ I) = K for T [m, n], in float64, from G [n, n], K [m, n] and ρ."""
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    with on_one_thread():
        solved: Tensor = torch.linalg.solve(regular, known, left=False)
    return solved


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Find the matrix of orthonormal columns (or rows, of a wide matrix) nearest to a float64 one.

    P Qᵀ of the decomposition P S Qᵀ (Schönemann, A Generalized Solution of the Orthogonal
    Procrustes Problem, Psychometrika 1966), on what the matrix spans.
    """
    left, _, right = singular_triplets(matrix)
    with on_one_thread():
        return left @ right


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute on one thread: LAPACK rounds differently on each number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
