"""DARE and DELLA: drop most of each task vector at random, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.kernels import Chunk, fold_drawn
from cl_merge.kernels.random_bits import random_bits
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger
from cl_merge.mergers.options import checked_count, checked_number, checked_shares, of_task
from cl_merge.mergers.task_arithmetic import TaskArithmetic
from cl_merge.mergers.ties import Combine, Sign, SignElection, Ties
from cl_merge.seeds import derive_seed


class _Dropping(Merger):
    def __init__(
        self, *, density: float | Sequence[float] = 0.1, seed: int = 0, **election: Any
    ) -> None:
        super().__init__(**election)
        self.density = checked_shares("density", density)
        self.seed = checked_count("seed", seed)

    def draws(self, chunk: Tensor, info: ChunkInfo) -> Tensor:
        """Draw a number from 0 to 2^63 - 1 for each value."""
        return random_bits(self.key(info), info.start, chunk.numel(), chunk.device)

    def key(self, info: ChunkInfo) -> int:
        """The key of the random numbers of a parameter and task."""
        return derive_seed(self.seed, info.name, info.task)

    def sparse(self, chunk: Chunk, info: ChunkInfo, like: Tensor) -> Tensor:
        """Drop values with equal probability, and rescale the others; `like` is of their size."""
        density = of_task("density", self.density, info.task)
        kept, limit = torch.zeros_like(like), int(density * 2.0**63) - 1
        if limit >= 0:
            fold_drawn(kept, chunk, self.key(info), info.start, limit)
        return kept.div_(density)


class Dare(_Dropping, TaskArithmetic):
    """Drop values of each task vector at random, rescale the others, and take the sum over tasks.

    Each value stays with probability `density` and is divided by it then, so that the mean over
    all draws is the task vector.

    Args:
        density: Share of each task vector that stays, on average, above 0 and up to 1; or a list,
            one for each task. The paper drops 90 % and more.
        seed: Chooses the random numbers, as in `RandomMix`.

    Example:
        >>> merger = Dare(density=0.5, seed=2)
        >>> merger.update({"weight": torch.ones(8)})
        >>> merger.merged()["weight"]
        tensor([2., 0., 0., 0., 2., 2., 0., 2.])

    Reference:
        Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
        Free Lunch, ICML 2024, section 3. It has no scale of its own: that of task arithmetic.
    """

    name = "dare"
    takes_differences = True

    def __init__(self, *, density: float | Sequence[float] = 0.1, seed: int = 0) -> None:
        super().__init__(density=density, seed=seed)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state["sum"].add_(self.sparse(chunk, info, state["sum"]))


class DareTies(_Dropping, SignElection):
    """Drop and rescale as in `Dare`, then elect a sign per element and average, as in `Ties`.

    Args:
        density: As of `Dare`.
        seed: As of `Dare`.
        sign: As of `Ties`.
        combine: As of `Ties`.
        task_weights: As of `Ties`.

    Example:
        >>> merger = DareTies(density=1)
        >>> merger.update({"weight": torch.tensor([4.0, 1.0])})
        >>> merger.update({"weight": torch.tensor([2.0, -3.0])})
        >>> merger.merged()["weight"]
        tensor([ 3., -3.])

    Reference:
        Yu et al., Language Models are Super Mario, ICML 2024, with the election of TIES (Yadav et
        al., NeurIPS 2023); scale as of `Ties`.
    """

    name = "dare-ties"
    published_scale = Ties.published_scale
    takes_differences = True

    def __init__(
        self,
        *,
        density: float | Sequence[float] = 0.1,
        seed: int = 0,
        sign: Sign = "value",
        combine: Combine = "mean",
        task_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            density=density, seed=seed, sign=sign, combine=combine, task_weights=task_weights
        )

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        self.stand(state, self.sparse(chunk, info, state["positive_sum"]), info.task)


class Della(_Dropping, SignElection):
    """Drop values at random by their rank, rescale the others, then elect and average as in `Ties`.

    *Drop* (MAGPRUNE): in each row of a matrix, which holds the weights of one output, values are
    ranked by magnitude, r = 0 for the largest to n - 1 for the smallest. A value is dropped with
    probability p = p_min + epsilon * r / n, p_min = 1 - density - epsilon / 2, and divided by 1 - p
    if it stays. Of equal magnitudes the first counts as larger. A parameter of one dimension is one
    row; one of more than two has a row for each index of its first dimension.

    Args:
        density: As of `Dare`.
        epsilon: By how much the probability of the smallest value exceeds that of the largest;
            0 makes it `DareTies`.
        seed: As of `Dare`.
        sign: As of `Ties`.
        combine: As of `Ties`.
        task_weights: As of `Ties`.

    Example:
        >>> merger = Della(density=0.5, epsilon=0.8, seed=1)
        >>> merger.update({"weight": torch.tensor([8.0, 4.0, 2.0, 1.0])})
        >>> merger.merged()["weight"]
        tensor([8.8889, 0.0000, 4.0000, 0.0000])

    Reference:
        Deep, Bhardwaj & Poria, DELLA-Merging: Reducing Interference in Model Merging through
        Magnitude-Based Sampling, 2024, section 3; scale as of `Ties`.
    """

    name = "della"
    published_scale = Ties.published_scale
    unit = "row"

    def __init__(
        self,
        *,
        density: float | Sequence[float] = 0.4,
        epsilon: float = 0.2,
        seed: int = 0,
        sign: Sign = "value",
        combine: Combine = "mean",
        task_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            density=density, seed=seed, sign=sign, combine=combine, task_weights=task_weights
        )
        self.epsilon = checked_number("epsilon", epsilon, 0, 1)
        for share in self.density if isinstance(self.density, list) else [self.density]:
            low, high = 1 - share - self.epsilon / 2, 1 - share + self.epsilon / 2
            if (low < 0 or high >= 1) and self.epsilon > 0:
                raise InputError(
                    f"density={share:g} and epsilon={self.epsilon:g} make probabilities from "
                    f"{low:g} to {high:g} to drop a value; expected 0 or more, and below 1"
                )

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        row = chunk.numel() if len(info.shape) < 2 else info.shape.numel() // info.shape[0]
        order = chunk.abs().view(-1, row).argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(row, device=chunk.device, dtype=torch.float64)
        # In float64, and from the largest on: with epsilon 0, this is 1 - density for all.
        density = of_task("density", self.density, info.task)
        drop = (1 - density - self.epsilon / 2) + self.epsilon * rank / row
        probability = torch.empty(order.shape, dtype=torch.float64, device=chunk.device)
        probability.scatter_(1, order, drop.expand_as(order).contiguous())
        probability = probability.view(-1)
        dropped = self.draws(chunk, info).to(torch.float64) < probability * 2.0**63
        values = (chunk / (1 - probability)).to(torch.float32).masked_fill_(dropped, 0)
        self.stand(state, values, info.task)
