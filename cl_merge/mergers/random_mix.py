"""RandMix: every element from a task drawn at random."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.kernels import fold_drawn
from cl_merge.mergers.base import Accumulators, Merger
from cl_merge.mergers.chunks import End, Place
from cl_merge.mergers.options import checked_count
from cl_merge.seeds import derive_seed

_LARGEST = 2**63 - 1


class RandomMix(Merger):
    """Take every element from one task vector, drawn uniformly.

    Reservoir sampling: the task of number t, counted from 1, replaces each element with probability
    1/t, so that after any number of tasks every one of them is equally likely. The random numbers
    are a function of seed, parameter name, task and element alone: neither the order of the
    parameters nor chunks, device or process change them.

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
    accumulators: ClassVar = {"merged": torch.float32}

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = checked_count("seed", seed)

    @override
    def fold(self, kept: Accumulators, chunk: Tensor, place: Place) -> None:
        merged = kept["merged"]
        key, limit = self._draw(place)
        if fold_drawn(merged, chunk, key, place.start, limit) is not None:
            return
        draws = random_bits(key, place.start, chunk.numel(), chunk.device)
        torch.where(draws <= limit, chunk, merged, out=merged)

    @override
    def fold_tuned(
        self, kept: Accumulators, tuned: Tensor, base: Tensor, place: Place
    ) -> bool | None:
        key, limit = self._draw(place)
        return fold_drawn(kept["merged"], (tuned, base), key, place.start, limit)

    @override
    def finish(self, kept: Accumulators, out: Tensor, end: End) -> None:
        out.copy_(kept["merged"])

    def _draw(self, place: Place) -> tuple[int, int]:
        """Which random numbers to draw, and up to which of them the task's value is taken."""
        return derive_seed(self.seed, place.name, place.task), _LARGEST // (place.task + 1)


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Draw random numbers by counter: number i depends on the key and on i alone.

    Args:
        key: Names the stream, 0 to 2^64 - 1, as `derive_seed` makes it.
        start: Index of the first number.
        count: n, how many.
        device: Where.

    Returns:
        Uniform numbers from 0 to 2^63 - 1, int64 [n].

    Reference:
        SplitMix64: Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA
        2014, figure 16, with Stafford's mix 13.
    """
    bits = torch.arange(start + 1, start + 1 + count, device=device)
    # int64 arithmetic wraps around, so that it equals the published unsigned one bit for bit.
    bits.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_signed(0x94D049BB133111EB))
    return _shifted(bits.bitwise_xor_(_shifted(bits, 31)), 1)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift fills with the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
