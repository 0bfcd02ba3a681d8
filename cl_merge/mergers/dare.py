"""DARE: drop most of each task vector at random, and rescale the rest."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from typing_extensions import override

from cl_merge.kernels.random_bits import random_bits
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger
from cl_merge.mergers.options import checked_count, checked_share
from cl_merge.mergers.task_arithmetic import TaskArithmetic
from cl_merge.mergers.ties import SignElection, Ties
from cl_merge.seeds import derive_seed


class _Dropping(Merger):
    """Hands each task vector on with values dropped at random and the others rescaled."""

    def __init__(self, *, density: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.density = checked_share("density", density)
        self.seed = checked_count("seed", seed)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        key = derive_seed(self.seed, info.name, info.task)
        draws = random_bits(key, info.start, chunk.numel(), chunk.device)
        dropped = draws > int(self.density * 2.0**63) - 1  # they are 0 to 2^63 - 1
        self.take(state, (chunk / self.density).masked_fill_(dropped, 0), info)

    @abstractmethod
    def take(self, state: Accumulators, values: Tensor, info: ChunkInfo) -> None:
        """Take up what is left of a chunk, float32 [n]."""


class Dare(_Dropping, TaskArithmetic):
    """Drop values of each task vector at random, rescale the others, and take the sum over tasks.

    Each value stays with probability `density` and is divided by it then, so that the mean over
    all draws is the task vector. The random numbers are a function of seed, parameter name, task
    and element alone.

    Args:
        density: Share of each task vector that stays, on average, above 0 and up to 1. The paper
            drops 90 % and more.
        seed: Chooses the random numbers.

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

    @override
    def take(self, state: Accumulators, values: Tensor, info: ChunkInfo) -> None:
        state["sum"].add_(values)


class DareTies(_Dropping, SignElection):
    """Drop and rescale as in `Dare`, then elect a sign per element and average, as in `Ties`.

    Args:
        density: Share of each task vector that stays, on average, above 0 and up to 1.
        seed: Chooses the random numbers.

    Example:
        >>> merger = DareTies(density=1)
        >>> merger.update({"weight": torch.tensor([4.0, 1.0])})
        >>> merger.update({"weight": torch.tensor([2.0, -3.0])})
        >>> merger.merged()["weight"]
        tensor([ 3., -3.])

    Reference:
        Yu et al., Language Models are Super Mario, ICML 2024, section 3, with the election of
        Yadav et al., TIES-Merging, NeurIPS 2023; scale as of `Ties`.
    """

    name = "dare-ties"
    published_scale = Ties.published_scale

    @override
    def take(self, state: Accumulators, values: Tensor, info: ChunkInfo) -> None:
        self.stand(state, values, info.task)
