"""Model Breadcrumbs: neither the largest nor the smallest changes of each layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.mergers.base import Accumulators, ChunkInfo, Reader
from cl_merge.mergers.options import checked_number, checked_shares, of_task
from cl_merge.mergers.task_arithmetic import TaskArithmetic
from cl_merge.mergers.threshold import magnitude_of_rank


class Breadcrumbs(TaskArithmetic):
    """Of each parameter leave out the smallest and the largest changes, and sum up the rest.

    Of n values, the floor(beta * n) smallest in magnitude and the floor(gamma * n) largest are left
    out, for every parameter of every task vector by itself; of equal magnitudes all stay. The
    authors count gamma from the other end: their 99.3 % is 0.007 here.

    Args:
        beta: Share of the smallest changes to leave out, 0 or more.
        gamma: Share of the largest changes to leave out, 0 or more; below 1 together with `beta`.
        density: In place of `beta`, the share that stays, or a list, one for each task, as mergekit
            and, with ``gamma=0``, peft's ``magnitude_prune`` count: floor(density * n) values below
            the largest ones, or from the smallest on where those are fewer.

    Example:
        >>> merger = Breadcrumbs(beta=0.4, gamma=0.2)
        >>> merger.update({"weight": torch.tensor([0.1, -9.0, 3.0, -2.0, 0.2])})
        >>> merger.merged()["weight"]
        tensor([ 0.,  0.,  3., -2.,  0.])

    Reference:
        Davari & Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks,
        ECCV 2024, section 3. Shares as they are common in code that follows it; its scale is chosen
        on held-out data: here that of task arithmetic.
    """

    name = "breadcrumbs"

    def __init__(
        self,
        *,
        beta: float = 0.85,
        gamma: float = 0.007,
        density: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.beta = checked_number("beta", beta, 0, 1)
        self.gamma = checked_number("gamma", gamma, 0, 1)
        self.density = None if density is None else checked_shares("density", density)
        if self.density is None and self.beta + self.gamma >= 1:
            raise InputError(
                f"beta={self.beta:g} and gamma={self.gamma:g} leave nothing; expected less than 1 "
                "together"
            )

    @override
    def prepare(self, vector: Reader) -> dict[str, tuple[float, float]]:
        """By parameter the magnitudes between which values stay."""
        density = self.density
        share = None if density is None else of_task("density", density, vector.task)
        return {name: self._limits(vector.only(name), share) for name in vector.shapes}

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        least, most = info.prepared[info.name]
        magnitude = chunk.abs()
        state["sum"].add_(chunk.masked_fill((magnitude < least) | (magnitude > most), 0))

    def _limits(self, parameter: Reader, density: float | None) -> tuple[float, float]:
        size = parameter.size
        below, above = int(self.beta * size), int(self.gamma * size)
        if density is not None:
            stay = int(density * size)
            below = max(0, size - stay - above)
            above = size - below - stay
        if below + above == size > 0:
            return float("inf"), 0.0
        least = magnitude_of_rank(parameter, below + 1) if below else 0.0
        most = magnitude_of_rank(parameter, size - above) if above else float("inf")
        return least, most
