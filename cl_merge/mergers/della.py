"""DELLA: drop the smaller changes with higher probability, elect signs, average."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.kernels.random_bits import random_bits
from cl_merge.mergers.base import Accumulators, ChunkInfo
from cl_merge.mergers.options import checked_count, checked_number, checked_share
from cl_merge.mergers.ties import SignElection, Ties
from cl_merge.seeds import derive_seed


class Della(SignElection):
    """Drop values at random by their rank, rescale the others, then elect and average as in `Ties`.

    *Drop* (MAGPRUNE): in each row of a matrix, which holds the weights of one output, values are
    ranked by magnitude, r = 0 for the largest to n - 1 for the smallest. A value is dropped with
    probability p = p_min + epsilon * r / n, p_min = 1 - density - epsilon / 2, and divided by 1 - p
    if it stays. Of equal magnitudes the first counts as larger. A parameter of one dimension is one
    row; one of more than two has a row for each index of its first dimension. *Elect* and *fuse*:
    the mean of the values that have the sign of their sum.

    Args:
        density: Share of each task vector that stays, on average, above 0 and up to 1.
        epsilon: By how much the probability of the smallest value exceeds that of the largest;
            0 makes it `DareTies`.
        seed: Chooses the random numbers, as in `RandomMix`.

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

    def __init__(self, *, density: float = 0.4, epsilon: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        self.density = checked_share("density", density)
        self.epsilon = checked_number("epsilon", epsilon, 0, 1)
        self.seed = checked_count("seed", seed)
        low, high = 1 - self.density - self.epsilon / 2, 1 - self.density + self.epsilon / 2
        if (low < 0 or high >= 1) and self.epsilon > 0:
            raise InputError(
                f"density={self.density:g} and epsilon={self.epsilon:g} make probabilities from "
                f"{low:g} to {high:g} to drop a value; expected 0 or more, and below 1"
            )

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        row = chunk.numel() if len(info.shape) < 2 else info.shape.numel() // info.shape[0]
        order = chunk.abs().view(-1, row).argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(row, device=chunk.device, dtype=torch.float64)
        # In float64, and from the largest on: with epsilon 0, this is 1 - density for all.
        drop = (1 - self.density - self.epsilon / 2) + self.epsilon * rank / row
        probability = torch.empty(order.shape, dtype=torch.float64, device=chunk.device)
        probability.scatter_(1, order, drop.expand_as(order).contiguous())
        probability = probability.view(-1)
        key = derive_seed(self.seed, info.name, info.task)
        draws = random_bits(key, info.start, chunk.numel(), chunk.device)
        dropped = draws.to(torch.float64) < probability * 2.0**63
        values = (chunk / (1 - probability)).to(torch.float32).masked_fill_(dropped, 0)
        self.stand(state, values, info.task)
