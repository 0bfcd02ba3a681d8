"""RandMix: every element from a task drawn at random."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.kernels import fold_drawn
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger
from cl_merge.mergers.options import checked_count
from cl_merge.seeds import derive_seed


class RandomMix(Merger):
    """Take every element from one task vector, drawn uniformly.

    Reservoir sampling: task t, counted from 1, replaces each element with probability 1/t, so that
    after any number of tasks all are equally likely. The random numbers are a function of seed,
    parameter name, task and element alone.

    Args:
        seed: Chooses the random numbers.

    Example:
        >>> merger = RandomMix(seed=4)
        >>> merger.update({"weight": torch.full([6], 1.0)})
        >>> merger.update({"weight": torch.full([6], 2.0)})
        >>> merger.merged()["weight"]
        tensor([2., 2., 2., 1., 1., 1.])

    Reference:
        Marczak et al., MagMax, ECCV 2024, "RandMix"; reservoir sampling: Vitter, Random Sampling
        with a Reservoir, ACM TOMS 1985, algorithm R.
    """

    name = "random-mix"
    published_scale = 1.0
    takes_differences = True
    accumulators: ClassVar = {"merged": torch.float32}

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = checked_count("seed", seed)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        key = derive_seed(self.seed, info.name, info.task)
        fold_drawn(state["merged"], chunk, key, info.start, limit=(2**63 - 1) // (info.task + 1))
