"""DOP: the matrix nearest to what was merged and to the new task where each has its strength."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger
from cl_merge.mergers.matrices import as_matrix, on_one_thread, singular_triplets
from cl_merge.mergers.options import checked_flag, checked_number

_NOTHING = 1e-10
"""Share of the largest weight below which neither matrix says anything about an entry."""


class DualProjection(Merger):
    """Merge each new task matrix with the merged one, each weighted along its singular vectors.

    Of the merged matrix τ₁ [m, n] and the new one τ₂, with weights a₁ = a and a₂ = 1 - a and
    singular value decompositions Uᵢ Sᵢ Vᵢᵀ, the new merged matrix W minimises
    Σ aᵢ (‖Sᵢ Uᵢᵀ (W - τᵢ)‖² + ‖(W - τᵢ) Vᵢ Sᵢ‖²): it is near to each in the output and in the input
    directions in which that one is strong. The minimum solves the Sylvester equation
    P W + W Q = 2 Σ aᵢ τᵢ τᵢᵀ τᵢ with P = Σ aᵢ τᵢ τᵢᵀ and Q = Σ aᵢ τᵢᵀ τᵢ, entry by entry in the
    eigenvectors of P and Q. Of entries to which both give no weight worth the name it takes the
    weighted mean. Parameters that are no matrices become the mean of both, as in the authors' code.

    The authors' published runs choose a anew in each of 200 gradient steps (MGDA), beginning at
    0.8, and end before the minimum; a fixed weight is an option of their code. It merges the
    weights of linear layers this way, here every two-dimensional parameter is a matrix.

    The order of the tasks matters.

    Args:
        alpha: a, the weight of what was merged before against the new task.
        flatten: Whether parameters of more than two dimensions, such as the kernels of
            convolutions, are matrices of one row for each output channel. The authors average them.

    Example:
        >>> merger = DualProjection(alpha=0.5)
        >>> merger.update({"weight": torch.tensor([[4.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"weight": torch.tensor([[2.0, 0.0], [0.0, 3.0]])})
        >>> merger.merged()["weight"] + 0.0
        tensor([[3.6000, 0.0000],
                [0.0000, 3.0000]])

    Reference:
        Yang et al., Continual Model Merging without Data: Dual Projections for Balancing Stability
        and Plasticity, NeurIPS 2025; alpha from the configuration of FusionBench. The merged task
        vector is applied as it is: scale 1.
    """

    name = "dop"
    published_scale = 1.0
    unit = "parameter"
    accumulators: ClassVar = {"merged": torch.float32}

    def __init__(self, *, alpha: float = 0.8, flatten: bool = False) -> None:
        super().__init__()
        self.alpha = checked_number("alpha", alpha, 0, 1)
        self.flatten = checked_flag("flatten", flatten)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        if info.task == 0:
            state["merged"].copy_(chunk)
            return
        merged = as_matrix(state["merged"].view(info.shape), self.flatten)
        if merged is None:
            state["merged"].add_(chunk).div_(2)
            return
        task = chunk.view(merged.shape)
        result = _nearest(merged.double(), task.double(), self.alpha)
        state["merged"].copy_(result.view(-1))


def _nearest(before: Tensor, task: Tensor, alpha: float) -> Tensor:
    """Minimise the loss, in float64: W [m, n] of P W + W Q = 2 Σ aᵢ τᵢ τᵢᵀ τᵢ."""
    pair = ((alpha, before), (1 - alpha, task))
    # P is the square of the matrices side by side, Q of those one above the other.
    weighted = [weight**0.5 * matrix for weight, matrix in pair]
    left, of_rows, _ = singular_triplets(torch.cat(weighted, dim=1))
    _, of_columns, right = singular_triplets(torch.cat(weighted))
    with on_one_thread():
        mean = torch.zeros(len(of_rows), len(of_columns), dtype=before.dtype, device=before.device)
        known = torch.zeros_like(mean)
        for weight, matrix in pair:
            entries = left.T @ matrix @ right.T
            mean += weight * entries
            known += 2 * weight * (entries @ entries.T @ entries)
        strengths = of_rows.square()[:, None] + of_columns.square()
        nothing = strengths <= _NOTHING * strengths[:1, :1]
        solved = torch.where(nothing, mean, known / strengths)
        return left @ solved @ right
