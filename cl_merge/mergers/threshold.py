"""The exact k-th magnitude of a whole task vector, without sorting it."""

from __future__ import annotations

import math
import struct
import threading

import numpy as np
import torch
from torch import Tensor

from cl_merge.kernels import bracket
from cl_merge.mergers.chunks import Reader

# Values from which the bracket of the threshold is read: a thousandth, but within limits.
_SMALL_SAMPLE = 1 << 17
_LARGE_SAMPLE = 1 << 22
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


def magnitude_of_rank(vector: Reader, rank: int, room: int = _ROOM) -> float:
    """Find the magnitude of a rank, exactly and without sorting.

    A sample tells between which two magnitudes it must lie, with near certainty; one pass counts
    what lies below them and collects what lies between, in which it is then found. Should it lie
    elsewhere, or too much lie between, two passes find it by the bits of the numbers.

    Args:
        vector: Reads the vector.
        rank: Counted from 1, the smallest.
        room: Values between the two magnitudes that may be held in memory.

    Returns:
        The rank-th smallest magnitude.

    Reference:
        The bracket from a sample: Floyd & Rivest, Expected Time Bounds for Selection, CACM 1975.
    """
    sample = vector.sample(min(max(vector.size >> 10, _SMALL_SAMPLE), _LARGE_SAMPLE))
    low, high, share = _sampled_bracket(sample, rank / vector.size)
    # Values of few bits are often equal: those at the two ends are counted, not collected.
    if share * vector.size <= room:
        parts = vector.map(lambda chunk: bracket(chunk, low, high, chunk.numel() // 8 + 64))
        found = _in_bracket(rank, low, high, parts)
        if found is not None:
            return found
    return _by_bits(vector, rank)


def _sampled_bracket(sample: Tensor, share: float) -> tuple[float, float, float]:
    """Two magnitudes between which that share of the sample's population ends, most likely.

    Returns:
        Both, and the share of the sample strictly between them.
    """
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
    if rank <= below:
        return None
    if rank <= below + at_low:
        return low
    wanted = rank - below - at_low
    if wanted <= len(between):
        return float(between.kthvalue(wanted).values)
    return high if wanted <= len(between) + at_high else None


def _by_bits(vector: Reader, rank: int) -> float:
    """Find the rank-th smallest magnitude, whatever the values.

    The bits of a float32, sign aside, order like its magnitude. One pass counts their upper half;
    a second one counts the lower half of those values that share the upper half of the one sought.
    """
    upper = _Counts()
    vector.map(lambda chunk: upper.add(_magnitude_bits(chunk) >> 16))
    prefix, below = upper.bin_of(rank)
    lower = _Counts()

    def add(chunk: Tensor) -> None:
        bits = _magnitude_bits(chunk)
        lower.add(bits[bits >> 16 == prefix] & 0xFFFF)

    vector.map(add)
    suffix, _ = lower.bin_of(rank - below)
    (magnitude,) = struct.unpack("f", struct.pack("I", prefix << 16 | suffix))
    return float(magnitude)


def _magnitude_bits(chunk: Tensor) -> Tensor:
    return chunk.view(torch.int32) & 0x7FFFFFFF


class _Counts:
    """How often each 16-bit number occurs, counted on several threads."""

    def __init__(self) -> None:
        # In numpy: torch would call up its threads for a table of this size, for every chunk.
        self._table = np.zeros(1 << 16, dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, numbers: Tensor) -> None:
        """Count numbers, an integer tensor [n]."""
        if numbers.numel() < len(self._table):
            # Fewer values than bins, as in a bias: do not go through all the bins for them.
            with self._lock:
                np.add.at(self._table, numbers.cpu().numpy(), 1)
            return
        counts = torch.bincount(numbers, minlength=len(self._table)).cpu().numpy()
        with self._lock:
            self._table += counts

    def bin_of(self, rank: int) -> tuple[int, int]:
        """Find the number that is the rank-th smallest, and how many lie below it."""
        cumulative = self._table.cumsum()
        position = int(np.searchsorted(cumulative, rank))
        return position, int(cumulative[position] - self._table[position])
