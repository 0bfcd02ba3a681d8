"""NaN and infinity: how to find them, and what to say."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a floating-point tensor holds neither NaN nor infinity."""
    # A sum reads the tensor once and makes no temporary of its size. NaN and infinity always show
    # in it; if it overflowed although all values are finite, the second look settles it.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Round to a dtype; None where a value is beyond what it holds, or is not finite."""
    # Types of one byte have no infinity to show it.
    if dtype.itemsize == 1 and not bool((values.abs() <= torch.finfo(dtype).max).all()):
        return None
    result = values.to(dtype)
    return result if dtype.itemsize == 1 or is_finite(result) else None


def not_finite(what: str, names: list[str]) -> InputError:
    """Make the error for tensors of these names, of what is called for example ``"task 3"``."""
    return InputError(
        f"{what}: NaN or infinity in {listing(names)}. Training diverged or a file is damaged: "
        "leave it out, or train again, for example with a lower learning rate"
    )
