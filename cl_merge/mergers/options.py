"""Checks of options that several mergers share."""

from __future__ import annotations

import math
from typing import Any

from cl_merge.errors import InputError


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """Make sure that an option is a number in a range.

    Args:
        name: The option.
        value: What was given.
        low: The smallest number that is allowed.
        high: The largest one.

    Returns:
        The number as a float.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> checked_number("t", 1, 0, 1)
        1.0
    """
    if _is_number(value) and math.isfinite(value) and low <= value <= high:
        return float(value)
    raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def checked_share(name: str, value: Any) -> float:
    """Make sure that an option is a share of something that is not empty.

    Args:
        name: The option.
        value: What was given.

    Returns:
        The share as a float.

    Raises:
        InputError: If it is no number above 0 and at most 1.

    Example:
        >>> checked_share("density", 0.2)
        0.2
    """
    if _is_number(value) and 0 < value <= 1:
        return float(value)
    raise InputError(f"{name} must be a number above 0 and at most 1, not {value!r}")


def checked_count(name: str, value: Any, least: int | None = None) -> int:
    """Make sure that an option is a whole number.

    Args:
        name: The option.
        value: What was given.
        least: The smallest that is allowed.

    Returns:
        The number.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> checked_count("seed", -3)
        -3
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (least is None or value >= least):
        return int(value)
    more = "" if least is None else f" of {least} or more"
    raise InputError(f"{name} must be a whole number{more}, not {value!r}")


def checked_flag(name: str, value: Any) -> bool:
    """Make sure that an option is true or false.

    Args:
        name: The option.
        value: What was given.

    Returns:
        The value.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> checked_flag("flatten", True)
        True
    """
    if isinstance(value, bool):
        return value
    raise InputError(f"{name} must be true or false, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
