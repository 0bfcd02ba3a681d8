"""RegMean: the layer whose outputs are nearest to those of each task on its own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import task_name
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo
from cl_merge.mergers.chunks import divide
from cl_merge.mergers.importances import check_same_weighed
from cl_merge.mergers.matrices import on_one_thread, solve_right
from cl_merge.mergers.options import checked_number

_LEAST = 1e-8
"""What every input direction counts at least, as a share of the mean, towards the average."""


class RegressionMean(Merger):
    """Find the linear layer that is nearest, in what it puts out, to each task's on its own inputs.

    With the mean G_t of x xᵀ over the inputs x of a layer in task t, which `gram_matrices`
    collects, the result T minimises the sum over tasks of tr((T - τ_t) G_t (T - τ_t)ᵀ):
    T = (Σ τ_t G_t)(Σ G_t)⁻¹. In G_t all but the diagonal is multiplied with `off_diagonal` first.
    Merging the weights in place of the task vectors gives the same. What has no Gram matrix, such
    as biases, norms and embeddings, is averaged, and so are directions in which no task had inputs.

    It comes with the Gram matrices of each task in place of importances. A matrix [m, n] takes
    8 n² + 12 m n bytes, whatever the number of tasks.

    Args:
        off_diagonal: Factor of what is not on the diagonal, 0 to 1. With 1 all counts as it was
            measured; with 0 each input counts by itself.

    Example:
        >>> merger, gram = RegressionMean(), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> merger.update({"weight": torch.tensor([[4.0, 0.0]])}, {"weight": gram})
        >>> merger.update({"weight": torch.tensor([[0.0, 8.0]])}, {"weight": torch.eye(2)})
        >>> merger.merged()["weight"]
        tensor([[3., 4.]])

    Reference:
        Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023,
        section 3; 0.9 is what it takes for most models.
    """

    name = "regmean"
    published_scale = 1.0
    unit = "parameter"
    weighted = True
    grams = True
    needs_base = False
    accumulators: ClassVar = {
        "sum": torch.float32,
        "weighted": torch.float64,  # Σ τ_t G_t, [m, n]
        "gram": torch.float64,  # Σ G_t, [n, n]
        "given": torch.int64,  # in how many tasks there was one, [1]
    }

    def __init__(self, *, off_diagonal: float = 0.9) -> None:
        super().__init__()
        self.off_diagonal = checked_number("off_diagonal", off_diagonal, 0, 1)

    @override
    def accumulator_shape(self, key: str, shape: torch.Size) -> torch.Size:
        if key == "sum":
            return shape
        if len(shape) != 2:
            return torch.Size([0])
        kept = {"weighted": shape, "gram": (shape[1], shape[1]), "given": (1,)}
        return torch.Size(kept[key])

    @override
    def update(
        self, vector: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None = None
    ) -> None:
        if self.tasks and importance is not None:
            before = [name for name, state in self._state.items() if bool(state["given"].any())]
            what = f"the importance of {task_name(self.tasks)}"
            names = [name for name in importance if name in vector and vector[name].numel()]
            check_same_weighed(names, before, what)
        super().update(vector, importance)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state["sum"].add_(chunk)
        if info.importance is None:
            return
        columns = info.shape[1]
        with on_one_thread():
            gram = info.importance.view(columns, columns).double()
            gram = self.off_diagonal * gram + (1 - self.off_diagonal) * gram.diagonal().diag()
            state["weighted"].add_((chunk.view(info.shape).double() @ gram).view(-1))
        state["gram"].add_(gram.view(-1))
        state["given"].add_(1)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        divide(state["sum"], info.tasks, out)
        if not bool(state["gram"].any()):
            return
        columns = info.shape[1]
        gram, mean = state["gram"].view(columns, columns), out.view(info.shape).double()
        with on_one_thread():
            least = _LEAST * gram.trace() / columns
        weighted = state["weighted"].view(info.shape) + least * mean
        out.copy_(solve_right(gram, weighted, least).view(-1))
