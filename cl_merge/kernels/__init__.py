"""The inner loops of merging: compiled where that is possible, else with torch, to the same bits.

Each function does one pass over memory. Compiled loops exist for contiguous float32 tensors on the
CPU, and for differences of float32 or bfloat16 weights.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_merge.kernels.compiled import library
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.random_bits import random_bits

_ENDINGS = {torch.float32: "_float32", torch.bfloat16: "_bfloat16"}
_BLOCK = 64  # as much as the loop of `bracket` writes beyond what counts
_LOCAL = threading.local()


class Difference:
    """A chunk of a task vector that is still fine-tuned weights and their base.

    Whoever uses it subtracts them on the way, and notes whether the difference is finite.

    Args:
        tuned: Fine-tuned weights, floating point [n].
        base: Those of the base, of the same dtype.
        broken: Makes the error to raise where the difference is not finite; None for no error.

    Attributes:
        finite: Whether all values are finite; known once they were used.
    """

    def __init__(
        self, tuned: Tensor, base: Tensor, broken: Callable[[], Exception] | None = None
    ) -> None:
        self.tuned = tuned
        self.base = base
        self.finite = True
        self._broken = broken

    def values(self) -> Tensor:
        """Subtract: float32 [n], valid until this thread's next call."""
        out = _buffer("values", self.tuned.numel())
        self.note(subtract(self.tuned, self.base, out))
        return out

    def numel(self) -> int:
        """Number of values."""
        return self.tuned.numel()

    def note(self, finite: bool) -> None:
        """Take down whether all values are finite; raises the error of those that are not."""
        self.finite = finite
        if not finite and self._broken is not None:
            raise self._broken()


Chunk = Tensor | Difference
"""A chunk of a task vector: float32 [n], or the weights that it is the difference of."""


def values_of(chunk: Chunk) -> Tensor:
    """The values of a chunk, float32 [n]."""
    return chunk if isinstance(chunk, Tensor) else chunk.values()


def subtract(tuned: Tensor, base: Tensor, out: Tensor) -> bool:
    """Compute out = tuned - base in float32 or wider, and tell whether all of it is finite.

    `tuned` and `base` are floating point of one dtype, `out` is float32.
    """
    difference = Difference(tuned, base)
    if _folded("difference", (out,), (), difference):
        return difference.finite
    torch.sub(tuned.to(wide(tuned.dtype)), base.to(wide(base.dtype)), out=out)
    return is_finite(out)


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

    `merged` is float32 [n], changed in place; `key` and `start` are those of `random_bits`.
    """
    if not _folded("fold_drawn", (merged,), (key, start, limit), chunk):
        draws = random_bits(key, start, merged.numel(), merged.device)
        torch.where(draws <= limit, values_of(chunk), merged, out=merged)


def fold_signed(
    sums: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor], chunk: Chunk, threshold: float
) -> None:
    """Add up and count the values whose magnitude reaches a threshold, in place.

    `sums`, float32 [n], and `counts`, int16 [n], are of the positive and of the negative values.
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
    """Count how many more elements have a positive total than have a negative one.

    `sums` are those of `fold_signed`, `count` is that of the positive values. Tells, too, whether
    somewhere values cancel out.
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
    """Take the mean of the values of the elected sign, that of their total, into float32 [n].

    `sums` and `counts` are those of `fold_signed`, `majority` (-1, 0 or 1) is the sign where the
    total is zero.
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
    chunk: Chunk, low: float, high: float, room: int
) -> tuple[tuple[int, int, int], Tensor | None]:
    """Count the magnitudes of a chunk around a bracket, and collect those within.

    Tells how many lie below, how many at the lower and how many at the upper end; and, in their
    order, those between, float32, or None where there are more than `room`.
    """
    given = (chunk,) if isinstance(chunk, Tensor) else (chunk.tuned, chunk.base)
    compiled, loop = _usable(*given), _loop("bracket", chunk)
    if compiled is not None and loop is not None:
        size = chunk.numel()
        room = min(room, size)
        between, counts = _buffer("between", room + _BLOCK), torch.empty(4, dtype=torch.int64)
        to, ends = _pointers(between, counts)
        found = getattr(compiled, loop)(*_pointers(*given), size, low, high, to, room, ends)
        if isinstance(chunk, Difference) and found >= 0:
            chunk.note(bool(counts[3]))
        between = between[:found].clone()
        is_full = found < 0
    else:
        magnitude = values_of(chunk).abs()
        between = magnitude[(magnitude > low) & (magnitude < high)]
        is_full = len(between) > room
        masks = (magnitude < low, magnitude == low, magnitude == high)
        counts = torch.stack([mask.count_nonzero() for mask in masks])
    if is_full:
        return (0, 0, 0), None
    below, at_low, at_high = counts[:3].tolist()
    return (below, at_low, at_high), between


def _folded(name: str, state: tuple[Tensor, ...], numbers: tuple[Any, ...], chunk: Chunk) -> bool:
    """Run a compiled loop, and note whether a difference is finite; False if there is none."""
    given = (chunk,) if isinstance(chunk, Tensor) else (chunk.tuned, chunk.base)
    compiled, loop = _usable(*state, *given), _loop(name, chunk)
    if compiled is None or loop is None or state[0].dtype != torch.float32:
        return False
    ends = (*_pointers(*given), chunk.numel())
    finite = getattr(compiled, loop)(*_pointers(*state), *numbers, *ends)
    if isinstance(chunk, Difference):
        chunk.note(bool(finite))
    return True


def _loop(name: str, chunk: Chunk) -> str | None:
    """Name of the compiled loop of a kind for a chunk's dtype; None if there is none."""
    if isinstance(chunk, Tensor):
        return name if chunk.dtype == torch.float32 else None
    ending = _ENDINGS.get(chunk.tuned.dtype)
    return f"{name}{ending}" if ending and chunk.base.dtype == chunk.tuned.dtype else None


def _buffer(name: str, size: int) -> Tensor:
    """Memory of this thread that stays in its cache, float32 [size]: valid until the next call."""
    buffer: Tensor = getattr(_LOCAL, name, torch.empty(0))
    if buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.float32)
        setattr(_LOCAL, name, buffer)
    return buffer[:size]


def _usable(*tensors: Tensor) -> ctypes.CDLL | None:
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return library()
    return None


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
