"""Random numbers by counter: each one is a function of its key and its index alone."""

from __future__ import annotations

import torch
from torch import Tensor


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Draw uniform numbers from 0 to 2^63 - 1, int64 [count], by counter.

    Number i, the first of which is `start`, depends on i and on the key alone: 0 to 2^64 - 1, as
    `derive_seed` makes it.

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
