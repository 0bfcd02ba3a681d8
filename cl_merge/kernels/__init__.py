"""The inner loops of merging: compiled where that is possible, else with torch, to the same bits.

Each function does one pass over memory. Compiled loops exist for contiguous float32 tensors on the
CPU, and for differences of float32 or bfloat16 weights.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from cl_merge.kernels.compiled import library
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.random_bits import random_bits

__all__ = [
    "Chunk",
    "Difference",
    "bracket",
    "count_signs",
    "elect",
    "fold_drawn",
    "fold_largest",
    "fold_signed",
    "fold_sum",
    "library",
    "subtract",
    "values_of",
    "wide",
]

_ENDINGS = {torch.float32: "_float32", torch.bfloat16: "_bfloat16"}
_BLOCK = 64  # more than the loop of `bracket` writes beyond what counts
_LOCAL = threading.local()


class Difference:
    """A chunk of a task vector that is still fine-tuned weights and their base.

    Whoever uses it subtracts them on the way, and notes whether the difference is finite.

    Args:
        tuned: Fine-tuned weights, floating point [n].
        base: Those of the base, of the same dtype.

    Attributes:
        finite: Whether all values are finite; known once they were used.
    """

    def __init__(self, tuned: Tensor, base: Tensor) -> None:
        self.tuned = tuned
        self.base = base
        self.finite = True

    def values(self) -> Tensor:
        """Subtract: float32 [n], valid until this thread's next call."""
        # Memory that the thread uses again and again stays in its cache.
        buffer: Tensor | None = getattr(_LOCAL, "buffer", None)
        if buffer is None or buffer.numel() < self.tuned.numel():
            buffer = _LOCAL.buffer = torch.empty(self.tuned.numel(), dtype=torch.float32)
        out = buffer[: self.tuned.numel()]
        self.finite = subtract(self.tuned, self.base, out)
        return out


Chunk = Tensor | Difference
"""A chunk of a task vector: float32 [n], or the weights that it is the difference of."""


def values_of(chunk: Chunk) -> Tensor:
    """The values of a chunk, float32 [n]."""
    return chunk if isinstance(chunk, Tensor) else chunk.values()


def subtract(tuned: Tensor, base: Tensor, out: Tensor) -> bool:
    """Compute out = tuned - base in float32 or wider, and tell whether all of it is finite.

    `tuned` and `base` are floating point of one dtype, `out` is float32.
    """
    finite = _compiled("difference", (out,), (), Difference(tuned, base))
    if finite is None:
        torch.sub(tuned.to(wide(tuned.dtype)), base.to(wide(base.dtype)), out=out)
        finite = is_finite(out)
    return finite


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_sum(total: Tensor, chunk: Chunk) -> None:
    """Add a chunk to a sum, float32 [n], in place."""
    if isinstance(chunk, Tensor) or not _folded("fold_sum", (total,), (), chunk):
        total.add_(values_of(chunk))


def fold_largest(merged: Tensor, chunk: Chunk) -> None:
    """Take the chunk's value where its magnitude is as large or larger; `merged` is float32 [n]."""
    if not _folded("fold_largest", (merged,), (), chunk):
        values = values_of(chunk)
        torch.where(values.abs() >= merged.abs(), values, merged, out=merged)


def fold_drawn(merged: Tensor, chunk: Chunk, key: int, start: int, limit: int) -> None:
    """Take the chunk's value where the random number of an element is at most `limit`.

    Args:
        merged: float32 [n]; changed in place.
        chunk: What to take from.
        key: Names the stream of random numbers, as in `random_bits`.
        start: Index of the first number.
        limit: The largest number that takes the chunk's value.
    """
    if not _folded("fold_drawn", (merged,), (key, start, limit), chunk):
        draws = random_bits(key, start, merged.numel(), merged.device)
        torch.where(draws <= limit, values_of(chunk), merged, out=merged)


def fold_signed(
    sums: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor], chunk: Chunk, threshold: float
) -> None:
    """Add up and count, by sign, the values whose magnitude reaches a threshold.

    Args:
        sums: Of the positive and of the negative values, float32 [n]; changed in place.
        counts: Of the same, int16 [n]; changed in place.
        chunk: The values.
        threshold: A float32 number.
    """
    if _folded("fold_signed", (*sums, *counts), (threshold,), chunk):
        return
    values = values_of(chunk)
    stays = torch.where(values.abs() >= threshold, values, 0)
    counts[0].add_(stays > 0)
    counts[1].add_(stays < 0)
    sums[0].add_(stays.clamp(min=0))
    sums[1].add_(stays.clamp_(max=0))


def count_signs(sums: tuple[Tensor, Tensor], count: Tensor) -> tuple[int, bool]:
    """Compare how many elements have a positive total with how many have a negative one.

    Args:
        sums: Of the positive and of the negative values, float32 [n].
        count: Of the positive ones, int16 [n].

    Returns:
        The difference, and whether somewhere values cancel out.
    """
    compiled = _usable(*sums, count)
    if compiled is None:
        total = sums[0] + sums[1]
        balance = int((total > 0).count_nonzero()) - int((total < 0).count_nonzero())
        return balance, bool(((total == 0) & (count > 0)).any())
    cancelled = ctypes.c_int()
    balance = compiled.count_signs(*_pointers(*sums, count), count.numel(), ctypes.byref(cancelled))
    return balance, bool(cancelled.value)


def elect(
    sums: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor], out: Tensor, majority: int
) -> None:
    """Take the mean of the values of the elected sign, that of their total.

    Args:
        sums: Of the positive and of the negative values, float32 [n].
        counts: Of the same, int16 [n].
        out: float32 [n].
        majority: The sign where the total is zero: -1, 0 or 1.
    """
    compiled = _usable(*sums, *counts, out)
    if compiled is not None:
        compiled.elect(*_pointers(*sums, *counts, out), out.numel(), majority)
        return
    total = sums[0] + sums[1]
    elected = torch.where(total == 0, majority, total)
    positive = elected > 0
    count = torch.where(positive, *counts)
    torch.where(positive, *sums, out=out)
    out.div_(count.clamp_(min=1))
    out.masked_fill_(elected == 0, 0)


def bracket(
    vector: Tensor, low: float, high: float, room: int
) -> tuple[tuple[int, int, int], Tensor | None]:
    """Count the magnitudes at the ends of a bracket, and collect those between.

    Args:
        vector: float32 [n].
        low: The lower end, a float32 number.
        high: The upper end.
        room: The most that are collected.

    Returns:
        How many lie below, how many at the lower and how many at the upper end, and those between,
        in their order, or None where there are too many.
    """
    compiled = _usable(vector)
    if compiled is None or vector.dtype != torch.float32:
        return _bracket(vector.abs(), low, high, room)
    room = min(room, vector.numel())
    between, counts = torch.empty(room + _BLOCK), torch.empty(3, dtype=torch.int64)
    found = compiled.bracket(
        vector.data_ptr(),
        vector.numel(),
        low,
        high,
        between.data_ptr(),
        room,
        counts.data_ptr(),
    )
    if found < 0:
        return (0, 0, 0), None
    below, at_low, at_high = counts.tolist()
    return (below, at_low, at_high), between[:found].clone()


def _bracket(
    magnitude: Tensor, low: float, high: float, room: int
) -> tuple[tuple[int, int, int], Tensor | None]:
    between = magnitude[(magnitude > low) & (magnitude < high)]
    if len(between) > room:
        return (0, 0, 0), None
    ends = (magnitude < low, magnitude == low, magnitude == high)
    below, at_low, at_high = (int(end.count_nonzero()) for end in ends)
    return (below, at_low, at_high), between


def _folded(name: str, state: tuple[Tensor, ...], numbers: tuple[Any, ...], chunk: Chunk) -> bool:
    """Run a compiled loop and note whether a difference is finite; whether it could be run."""
    finite = _compiled(name, state, numbers, chunk)
    if finite is not None and isinstance(chunk, Difference):
        chunk.finite = finite
    return finite is not None


def _compiled(
    name: str, state: tuple[Tensor, ...], numbers: tuple[Any, ...], chunk: Chunk
) -> bool | None:
    """Run a compiled loop; whether a difference is finite, None if it could not be run."""
    given = (chunk,) if isinstance(chunk, Tensor) else (chunk.tuned, chunk.base)
    compiled = _usable(*state, *given)
    if compiled is None or state[0].dtype != torch.float32:
        return None
    if isinstance(chunk, Tensor):
        if chunk.dtype != torch.float32:
            return None
        getattr(compiled, name)(*_pointers(*state), *numbers, chunk.data_ptr(), chunk.numel())
        return True
    dtype = chunk.tuned.dtype
    if dtype not in _ENDINGS or dtype != chunk.base.dtype:
        return None
    loop = getattr(compiled, name + _ENDINGS[dtype])
    return bool(loop(*_pointers(*state), *numbers, *_pointers(*given), chunk.tuned.numel()))


def _usable(*tensors: Tensor) -> ctypes.CDLL | None:
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return library()
    return None


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
