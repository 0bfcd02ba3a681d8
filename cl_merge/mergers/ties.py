"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

import math
import struct
import threading
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.kernels import bracket, count_signs, elect, fold_signed
from cl_merge.mergers.base import Accumulators, Merger
from cl_merge.mergers.chunks import End, Place, Reader

_COUNT = torch.int16
_MOST_TASKS = torch.iinfo(_COUNT).max

# Values from which the bracket of the threshold is read: a thousandth, but within limits.
_SMALL_SAMPLE = 1 << 17
_LARGE_SAMPLE = 1 << 22
_ROOM = 1 << 24  # values between its ends that may be held in memory


class Ties(Merger):
    """Trim each task vector, elect a sign per element, and average the values that agree with it.

    *Trim*: of each task vector only the values of largest magnitude stay, all those that reach its
    own k-th smallest magnitude over all parameters, k = d - floor(density * d).
    *Elect*: the sign of an element is that of the sum over tasks; elements whose sum is zero take
    the sign of the majority, that of the sum of all signs. *Merge*: the mean of the values of the
    elected sign; 0 where there is none.

    The density is that of what is given: the published runs trimmed whole CLIP models, in which the
    frozen text tower counts as zeros, so that their 20 % is 34.7 % of the image encoder.

    Args:
        density: Share of each task vector that stays, above 0 and up to 1.

    Example:
        >>> merger = Ties(density=0.2)
        >>> merger.update({"weight": torch.tensor([4.0, 3.0, 1.0, -0.2, 0.1])})
        >>> merger.update({"weight": torch.tensor([2.0, -5.0, 0.3, 0.1, 0.2])})
        >>> merger.merged()["weight"]
        tensor([ 3., -5.,  0.,  0.,  0.])

    Reference:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023,
        section 3 and algorithm 1; scale from Marczak et al., MagMax, ECCV 2024.
    """

    name = "ties"
    published_scale = 0.55
    accumulators: ClassVar = {
        "positive_sum": torch.float32,
        "negative_sum": torch.float32,
        "positive_count": _COUNT,
        "negative_count": _COUNT,
    }

    def __init__(self, *, density: float = 0.2) -> None:
        super().__init__()
        self.density = _checked_density(density)

    @override
    def survey(self, vector: Reader) -> float:
        return trim_threshold(vector, self.density)

    @override
    def fold(self, kept: Accumulators, chunk: Tensor, place: Place) -> None:
        if place.task >= _MOST_TASKS:
            raise InputError(f"TIES counts up to {_MOST_TASKS} tasks; merge them in groups")
        sums, counts = _by_sign(kept)
        if fold_signed(sums, counts, chunk, place.survey) is not None:
            return
        trimmed = torch.where(chunk.abs() >= place.survey, chunk, 0)
        counts[0].add_(trimmed > 0)
        counts[1].add_(trimmed < 0)
        sums[0].add_(trimmed.clamp(min=0))
        sums[1].add_(trimmed.clamp_(max=0))

    @override
    def fold_tuned(
        self, kept: Accumulators, tuned: Tensor, base: Tensor, place: Place
    ) -> bool | None:
        return fold_signed(*_by_sign(kept), (tuned, base), place.survey)

    @override
    def tally(self, kept: Accumulators) -> tuple[int, bool]:
        sums, counts = _by_sign(kept)
        counted = count_signs(sums, counts[0])
        if counted is not None:
            return counted
        total = sums[0] + sums[1]
        balance = int((total > 0).count_nonzero()) - int((total < 0).count_nonzero())
        return balance, bool(((total == 0) & (counts[0] > 0)).any())

    @override
    def finish(self, kept: Accumulators, out: Tensor, end: End) -> None:
        sums, counts = _by_sign(kept)
        majority = (end.tally > 0) - (end.tally < 0)
        if elect(sums, counts, out, majority):
            return
        total = sums[0] + sums[1]
        elected = torch.where(total == 0, majority, total)
        positive = elected > 0
        count = torch.where(positive, *counts)
        torch.where(positive, *sums, out=out)
        out.div_(count.clamp_(min=1))
        out.masked_fill_(elected == 0, 0)


def _by_sign(kept: Accumulators) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The sums and the counts, of the positive and of the negative values."""
    return (
        (kept["positive_sum"], kept["negative_sum"]),
        (kept["positive_count"], kept["negative_count"]),
    )


def _checked_density(density: Any) -> float:
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if number and 0 < density <= 1:
        return float(density)
    raise InputError(f"density must be a number above 0 and at most 1, not {density!r}")


def trim_threshold(vector: Reader, density: float) -> float:
    """Find the magnitude from which values stay, exactly and without sorting.

    A sample tells between which two magnitudes it must lie, with near certainty; one pass counts
    what lies below them and collects what lies between, in which it is then found. Should it lie
    elsewhere, or too much lie between, two passes find it by the bits of the numbers.

    Args:
        vector: Reads the vector.
        density: Share of the d values that stays.

    Returns:
        The k-th smallest magnitude, k = d - floor(density * d); 0 if k is 0, so that all stay.

    Example:
        >>> values = {"weight": torch.tensor([0.5, -4.0, 3.0, -2.0, 1.0])}
        >>> trim_threshold(Reader.of(values), density=0.4)
        2.0

    Reference:
        The bracket from a sample: Floyd & Rivest, Expected Time Bounds for Selection, CACM 1975.
    """
    rank = vector.size - int(density * vector.size)
    if rank == 0:
        return 0.0
    sample = vector.sample(min(max(vector.size >> 10, _SMALL_SAMPLE), _LARGE_SAMPLE))
    low, high, share = _sampled_bracket(sample, rank / vector.size)
    # Values of few bits are often equal: those at the two ends are counted, not collected.
    if share * vector.size <= _ROOM:
        parts = vector.map(lambda chunk: _bracketed(chunk, low, high))
        found = _in_bracket(rank, low, high, parts)
        if found is not None:
            return found
    return _by_bits(vector, rank)


Bracketed = tuple[tuple[int, int, int], Tensor | None]
"""How many magnitudes lie below a bracket, at its lower and at its upper end, and those between."""


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


def _bracketed(chunk: Tensor, low: float, high: float) -> Bracketed:
    room = chunk.numel() // 8 + 64
    found = bracket(chunk, low, high, room)
    if found is not None:
        return found
    magnitude = chunk.abs()
    between = magnitude[(magnitude > low) & (magnitude < high)]
    if len(between) > room:
        return (0, 0, 0), None
    ends = (magnitude < low, magnitude == low, magnitude == high)
    below, at_low, at_high = (int(end.count_nonzero()) for end in ends)
    return (below, at_low, at_high), between


def _in_bracket(rank: int, low: float, high: float, parts: list[Bracketed]) -> float | None:
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
