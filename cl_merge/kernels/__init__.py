"""The inner loops of merging, compiled where that is possible.

Each function does one pass over memory and tells whether it could: it cannot without the compiled
loops, on another device, or for other dtypes. Its caller then does the same with torch, to the same
bits.

The folds change accumulators in place. They take one chunk of a task vector or, at once, the
fine-tuned weights and the base whose difference it is. They return whether all of that difference
is finite, True for a task vector, and None if nothing was done.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from cl_merge.kernels.compiled import library

__all__ = [
    "Chunk",
    "bracket",
    "count_signs",
    "difference",
    "elect",
    "fold_drawn",
    "fold_largest",
    "fold_signed",
    "fold_sum",
    "library",
]

Chunk = Tensor | tuple[Tensor, Tensor]
"""A task vector, float32 [n]; or fine-tuned weights and base, both float32 or both bfloat16 [n]."""

_ENDINGS = {torch.float32: "_float32", torch.bfloat16: "_bfloat16"}
_BLOCK = 64  # more than the loop of `bracket` writes beyond what counts


def difference(tuned: Tensor, base: Tensor, out: Tensor) -> bool | None:
    """Subtract weights: out = tuned - base, float32 [n]; returns what a fold does."""
    return _fold("difference", (out,), (), (tuned, base))


def fold_sum(total: Tensor, chunk: Chunk) -> bool | None:
    """Add a chunk to a sum, float32 [n]."""
    return _fold("fold_sum", (total,), (), chunk)


def fold_largest(merged: Tensor, chunk: Chunk) -> bool | None:
    """Take the chunk's value where its magnitude is as large or larger; merged is float32 [n]."""
    return _fold("fold_largest", (merged,), (), chunk)


def fold_drawn(merged: Tensor, chunk: Chunk, key: int, start: int, limit: int) -> bool | None:
    """Take the chunk's value where the random number of an element is at most a limit.

    Args:
        merged: float32 [n].
        chunk: What to take from.
        key: Names the stream of random numbers, as in `random_bits`.
        start: Index of the first number.
        limit: The largest number that takes the chunk's value.
    """
    return _fold("fold_drawn", (merged,), (key, start, limit), chunk)


def fold_signed(
    sums: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor], chunk: Chunk, threshold: float
) -> bool | None:
    """Add up and count, by sign, the values whose magnitude reaches a threshold.

    Args:
        sums: Of the positive and of the negative values, float32 [n].
        counts: Of the same, int16 [n].
        chunk: The values.
        threshold: A float32 number.
    """
    return _fold("fold_signed", (*sums, *counts), (threshold,), chunk)


def count_signs(sums: tuple[Tensor, Tensor], count: Tensor) -> tuple[int, bool] | None:
    """Compare how many elements have a positive total with how many have a negative one.

    Args:
        sums: Of the positive and of the negative values, float32 [n].
        count: Of the positive ones, int16 [n].

    Returns:
        The difference, and whether somewhere values cancel out; None if it was not done.
    """
    compiled = _usable(*sums, count)
    if compiled is None:
        return None
    cancelled = ctypes.c_int()
    balance = compiled.count_signs(*_pointers(*sums, count), count.numel(), ctypes.byref(cancelled))
    return balance, bool(cancelled.value)


def elect(
    sums: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor], out: Tensor, majority: int
) -> bool:
    """Write the mean of the values of the elected sign, that of their total, to `out`.

    Args:
        sums: Of the positive and of the negative values, float32 [n].
        counts: Of the same, int16 [n].
        out: float32 [n].
        majority: The sign where the total is zero: -1, 0 or 1.

    Returns:
        Whether it was done.
    """
    compiled = _usable(*sums, *counts, out)
    if compiled is None:
        return False
    compiled.elect(*_pointers(*sums, *counts, out), out.numel(), majority)
    return True


def bracket(
    vector: Tensor, low: float, high: float, room: int
) -> tuple[tuple[int, int, int], Tensor | None] | None:
    """Count the magnitudes at the ends of a bracket, and collect those between.

    Args:
        vector: float32 [n].
        low: The lower end, a float32 number.
        high: The upper end.
        room: The most that are collected.

    Returns:
        How many lie below, how many at the lower and how many at the upper end, and those between,
        in their order, or None where there are too many; None if it was not done.
    """
    compiled = _usable(vector)
    if compiled is None or vector.dtype != torch.float32:
        return None
    room = min(room, vector.numel())
    between, counts = torch.empty(room + _BLOCK), torch.empty(3, dtype=torch.int64)
    ends = (vector.numel(), low, high)
    found = compiled.bracket(
        vector.data_ptr(), *ends, *_pointers(between), room, *_pointers(counts)
    )
    if found < 0:
        return (0, 0, 0), None
    below, at_low, at_high = counts.tolist()
    return (below, at_low, at_high), between[:found].clone()


def _fold(
    name: str, accumulators: tuple[Tensor, ...], numbers: tuple[Any, ...], chunk: Chunk
) -> bool | None:
    compiled = _usable(*accumulators, *((chunk,) if isinstance(chunk, Tensor) else chunk))
    if compiled is None or accumulators[0].dtype != torch.float32:
        return None
    if isinstance(chunk, Tensor):
        if chunk.dtype != torch.float32:
            return None
        loop = getattr(compiled, name)
        loop(*_pointers(*accumulators), *numbers, chunk.data_ptr(), chunk.numel())
        return True
    tuned, base = chunk
    if tuned.dtype not in _ENDINGS or tuned.dtype != base.dtype:
        return None
    loop = getattr(compiled, name + _ENDINGS[tuned.dtype])
    return bool(loop(*_pointers(*accumulators), *numbers, *_pointers(*chunk), tuned.numel()))


def _usable(*tensors: Tensor) -> ctypes.CDLL | None:
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return library()
    return None


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
