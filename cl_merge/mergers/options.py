"""Checks of options that several mergers share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cl_merge.errors import InputError

_MOST = 1e6  # a larger weight is no weight


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """Make sure that an option is a finite number in a range, which includes its ends."""
    if _is_number(value) and low <= value <= high and abs(value) <= sys.float_info.max:
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


def checked_choice(name: str, value: Any, known: Sequence[str]) -> str:
    """Make sure that an option is one of several words."""
    if value in known:
        return str(value)
    raise InputError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}")


def checked_shares(name: str, value: Any) -> float | list[float]:
    """Make sure that an option is a number above 0 and at most 1, or a list of them."""
    if isinstance(value, (list, tuple)) and value:
        return [checked_share(name, each) for each in value]
    if isinstance(value, str):
        raise InputError(
            f"{name} must be a number above 0 and at most 1, or a list of them, as in [0.5,0.3], "
            f"not {value!r}"
        )
    return checked_share(name, value)


def checked_weights(name: str, value: Any) -> list[float] | None:
    """Make sure that an option is a list of finite numbers, or None."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and value:
        return [checked_number(name, each, -_MOST, _MOST) for each in value]
    raise InputError(f"{name} must be a list of numbers, one for each task, not {value!r}")


def of_task(name: str, value: float | list[float], task: int) -> float:
    """What an option says of a task: a number counts for all of them, a list has one for each."""
    if not isinstance(value, list):
        return value
    if task >= len(value):
        raise InputError(f"{name} has {len(value)} values, but there are more tasks than that")
    return value[task]


def check_per_task(options: Mapping[str, Any], tasks: int) -> None:
    """Make sure that options that are lists of one number for each task have as many."""
    for name in ("density", "task_weights"):
        value = options.get(name)
        if isinstance(value, list) and len(value) != tasks:
            raise InputError(
                f"{name} has {len(value)} values for {tasks} tasks; give one for each task"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
