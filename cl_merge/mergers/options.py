"""Checks of options that several mergers share."""

from __future__ import annotations

import math
from typing import Any

from cl_merge.errors import InputError


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """Make sure that an option is a finite number in a range, which includes its ends."""
    if _is_number(value) and math.isfinite(value) and low <= value <= high:
        return float(value)
    raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def checked_share(name: str, value: Any) -> float:
    """Make sure that an option is a number above 0 and at most 1."""
    if _is_number(value) and 0 < value <= 1:
        return float(value)
    raise InputError(f"{name} must be a number above 0 and at most 1, not {value!r}")


def checked_count(name: str, value: Any, least: int | None = None) -> int:
    """Make sure that an option is a whole number."""
    if isinstance(value, int) and _is_number(value) and (least is None or value >= least):
        return int(value)
    more = "" if least is None else f" of {least} or more"
    raise InputError(f"{name} must be a whole number{more}, not {value!r}")


def checked_flag(name: str, value: Any) -> bool:
    """Make sure that an option is true or false."""
    if isinstance(value, bool):
        return value
    raise InputError(f"{name} must be true or false, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
