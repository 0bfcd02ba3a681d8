"""The inner loops of merging, compiled where that is possible.

Each function does one pass over memory and tells whether it could: it cannot without a C compiler,
on another device, or for other dtypes. Its caller then does the same with torch, to the same bits.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cl_merge.kernels.compiled import library

__all__ = ["bracket", "difference", "fold_drawn", "fold_largest", "fold_signed", "library"]

_ROOM = 8  # one in so many values may lie in a bracket
_DIFFERENCES = {
    torch.float32: "difference_float32",
    torch.bfloat16: "difference_bfloat16",
}


def difference(tuned: Tensor, base: Tensor, out: Tensor) -> bool | None:
    """Subtract: out = tuned - base.

    Args:
        tuned: [n], float32 or bfloat16.
        base: [n], of the same dtype.
        out: float32 [n].

    Returns:
        Whether all of it is finite; None if nothing was done.
    """
    name = _DIFFERENCES.get(tuned.dtype)
    if name is None or base.dtype != tuned.dtype or out.dtype != torch.float32:
        return None
    compiled = _usable(tuned, base, out)
    if compiled is None:
        return None
    return bool(compiled[name](*_pointers(tuned, base, out), ctypes.c_int64(out.numel())))


def fold_largest(merged: Tensor, vector: Tensor) -> bool:
    """Take the vector's value where its magnitude is as large or larger.

    Args:
        merged: float32 [n]; changed in place.
        vector: float32 [n].

    Returns:
        Whether it was done.
    """
    compiled = _usable(merged, vector)
    if compiled is None or not _float32(merged, vector):
        return False
    compiled.fold_largest(*_pointers(merged, vector), ctypes.c_int64(merged.numel()))
    return True


def fold_drawn(merged: Tensor, vector: Tensor, key: int, start: int, limit: int) -> bool:
    """Take the vector's value where the random number of an element is small enough.

    Args:
        merged: float32 [n]; changed in place.
        vector: float32 [n].
        key: Names the stream of random numbers, as in `random_bits`.
        start: Index of the first number.
        limit: The largest number that takes the vector's value.

    Returns:
        Whether it was done.
    """
    compiled = _usable(merged, vector)
    if compiled is None or not _float32(merged, vector):
        return False
    numbers = (ctypes.c_int64(merged.numel()), *map(ctypes.c_uint64, (key, start, limit)))
    compiled.fold_drawn(*_pointers(merged, vector), *numbers)
    return True


def fold_signed(
    sums: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor], vector: Tensor, threshold: float
) -> bool:
    """Add up and count, by sign, the values whose magnitude reaches a threshold.

    Args:
        sums: Of the positive and of the negative values, float32 [n]; changed in place.
        counts: Of the same, int16 [n]; changed in place.
        vector: float32 [n].
        threshold: A float32 number.

    Returns:
        Whether it was done.
    """
    tensors = (*sums, *counts, vector)
    compiled = _usable(*tensors)
    if compiled is None or not _float32(*sums, vector):
        return False
    compiled.fold_signed(
        *_pointers(*tensors), ctypes.c_int64(vector.numel()), ctypes.c_float(threshold)
    )
    return True


def bracket(vector: Tensor, low: float, high: float) -> tuple[int, Tensor] | None:
    """Count the magnitudes below a bracket, and collect those in it.

    Args:
        vector: float32 [n].
        low: The smallest magnitude in the bracket, a float32 number.
        high: The largest.

    Returns:
        How many lie below, and those that lie inside, in their order; None if it was not done, or
        too many lie inside.
    """
    compiled = _usable(vector)
    if compiled is None or not _float32(vector):
        return None
    size, room = vector.numel(), vector.numel() // _ROOM + 64
    inside, below = torch.empty(room + 1), ctypes.c_int64()
    ends = ctypes.c_float(low), ctypes.c_float(high)
    compiled.bracket.restype = ctypes.c_int64
    found = compiled.bracket(
        *_pointers(vector),
        ctypes.c_int64(size),
        *ends,
        *_pointers(inside),
        ctypes.c_int64(room),
        ctypes.byref(below),
    )
    return (below.value, inside[:found].clone()) if found >= 0 else None


def _usable(*tensors: Tensor) -> ctypes.CDLL | None:
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return library()
    return None


def _float32(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
