"""NaN and infinity: how to find them, and what to say."""

from __future__ import annotations

from torch import Tensor

from cl_merge.errors import InputError, listing


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a floating-point tensor holds neither NaN nor infinity."""
    # A sum reads the tensor once and makes no temporary of its size. NaN and infinity always show
    # in it; if it overflowed although all values are finite, the second look settles it.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def not_finite(what: str, names: list[str]) -> InputError:
    """Make the error for tensors of these names, of what is called for example ``"task 3"``."""
    return InputError(
        f"{what}: NaN or infinity in {listing(names)}. Training diverged or a file is damaged: "
        "leave it out, or train again, for example with a lower learning rate"
    )
