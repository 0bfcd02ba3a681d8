"""The exact k-th magnitude of a whole task vector, without sorting it."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from functools import partial

import torch
from torch import Tensor

from cl_merge.kernels import bracket
from cl_merge.mergers.chunks import Reader

# Values from which the bracket of the threshold is read: of n values about n ** (2 / 3), with which
# reading them takes as long as collecting what lies in the bracket; short runs where they are few.
_SMALL_SAMPLE = 1 << 12
_LARGE_SAMPLE = 1 << 22
_FEW = 1 << 16
_ROOM = 1 << 24


def trim_threshold(vector: Reader, density: float, room: int = _ROOM) -> float:
    """Find the magnitude from which the share `density` of the values stays, exactly.

    The k-th smallest magnitude of d, k = d - floor(density * d); 0 if k is 0, so that all stay.

    Example:
        >>> values = {"weight": torch.tensor([0.5, -4.0, 3.0, -2.0, 1.0])}
        >>> trim_threshold(Reader.of(values), density=0.4)
        2.0
    """
    rank = vector.size - int(density * vector.size)
    return magnitude_of_rank(vector, rank, room) if rank > 0 else 0.0


def threshold_of_largest(vector: Reader, share: float) -> float:
    """Find the magnitude from which the share of the largest values stays, but at least one.

    As many as floor(share * d) of d, where others are not as large as the last of them: one fewer
    than with `trim_threshold`.

    Example:
        >>> values = {"weight": torch.tensor([0.5, -4.0, 3.0, -2.0, 1.0])}
        >>> threshold_of_largest(Reader.of(values), share=0.4)
        3.0
    """
    largest = max(1, int(share * vector.size))
    rank = vector.size - largest + 1
    return magnitude_of_rank(vector, rank) if rank > 1 else 0.0


def magnitude_of_rank(vector: Reader, rank: int, room: int = _ROOM) -> float:
    """Find the rank-th smallest magnitude, counted from 1, exactly and without sorting.

    A sample tells between which two magnitudes it must lie, with near certainty; one pass counts
    what lies below them and collects what lies between, in which it is then found. Should it lie
    elsewhere, or more than `room` values between, 31 more passes find it by counting alone.

    Reference:
        The bracket from a sample: Floyd & Rivest, Expected Time Bounds for Selection, CACM 1975.
    """
    count = min(max(round(0.5 * vector.size ** (2 / 3)), _SMALL_SAMPLE), _LARGE_SAMPLE)
    sample = vector.sample(count, run=256 if count > _FEW else 32)
    low, high, share = _sampled_bracket(sample, rank / vector.size)
    # Values of few bits are often equal: those at the two ends are counted, not collected.
    if share * vector.size <= room:
        parts = vector.map_chunks(lambda chunk: bracket(chunk, low, high, chunk.numel() // 4 + 64))
        found = _in_bracket(rank, low, high, parts)
        if found is not None:
            return found
    # Bit by bit: those of a float32, sign aside, order like its magnitude.
    bits = bisect_left(range(0x7FFFFFFF), rank, key=partial(_count, vector))
    (magnitude,) = struct.unpack("f", struct.pack("I", bits))
    return float(magnitude)


def _sampled_bracket(sample: Tensor, share: float) -> tuple[float, float, float]:
    """Two magnitudes between which that share of all values ends, and the sample's share there."""
    ordered = sample.abs().sort().values
    size = len(ordered)
    # Six standard deviations of the number of values below, and some for small samples.
    margin = 6 * math.sqrt(share * (1 - share) * size) + 2
    first, last = int(share * size - margin), int(share * size + margin)
    low = float(ordered[first]) if first > 0 else 0.0
    high = float(ordered[last]) if last < size else math.inf
    between = int(((ordered > low) & (ordered < high)).count_nonzero())
    return low, high, between / max(size, 1)


def _in_bracket(
    rank: int, low: float, high: float, parts: list[tuple[tuple[int, int, int], Tensor | None]]
) -> float | None:
    """Find the rank-th smallest magnitude in what a pass has counted; None if it is not there."""
    collected = [between for _, between in parts if between is not None]
    if len(collected) < len(parts):
        return None
    below, at_low, at_high = (sum(counts[i] for counts, _ in parts) for i in range(3))
    between = torch.cat(collected)
    if below < rank <= below + at_low:
        return low
    wanted = rank - below - at_low
    if 0 < wanted <= len(between):
        return float(between.kthvalue(wanted).values)
    return high if 0 < wanted - len(between) <= at_high else None


def _count(vector: Reader, largest: int) -> int:
    """Count the values whose magnitude, as the bits of a float32, is at most the largest."""

    def of_chunk(chunk: Tensor) -> int:
        return int(((chunk.view(torch.int32) & 0x7FFFFFFF) <= largest).count_nonzero())

    return sum(vector.map(of_chunk))
