"""Checks of what a JSON file holds: they say what is wrong, behind the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# A check of a value yields what is wrong with it, such as ``.seed is -1; expected a whole number``.
Check = Callable[[Any], Iterator[str]]


def of(what: str, fits: Callable[[Any], bool]) -> Check:
    """Make a check of one value.

    Args:
        what: What is expected, in words.
        fits: Whether a value is that.

    Returns:
        The check.

    Example:
        >>> list(of("text", lambda value: isinstance(value, str))(3))
        [' is 3; expected text']
    """

    def check(value: Any) -> Iterator[str]:
        if not fits(value):
            shown = repr(value)
            yield f" is {shown if len(shown) <= 40 else shown[:37] + '...'}; expected {what}"

    return check


def _is_number(value: Any) -> bool:
    # Neither infinity nor NaN, nor a whole number that is too large for a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


TEXT = of("text", lambda value: isinstance(value, str))
COUNT = of("a whole number", _is_count)
AMOUNT = of("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
FIGURE = of("a finite number or null", lambda value: value is None or _is_number(value))
PER_CENT = of(
    "a number from 0 to 100 or null",
    lambda value: value is None or (_is_number(value) and 0 <= value <= 100),
)
NAME = of("text or null", lambda value: value is None or isinstance(value, str))
SCALE = of(
    "a number, numbers by pattern, or null",
    lambda value: (
        value is None
        or _is_number(value)
        or (isinstance(value, dict) and len(value) > 0 and all(map(_is_number, value.values())))
    ),
)


ACCURACY = of("a number from 0 to 100", lambda value: _is_number(value) and 0 <= value <= 100)


def list_of(each: Check) -> Check:
    """Make a check of a list that is not empty from that of its items."""

    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, list) or not value:
            yield from of("a list", lambda _: False)(value)
            return
        for place, item in enumerate(value):
            yield from (f"[{place}]{wrong}" for wrong in each(item))

    return check


def mapping_of(each: Check) -> Check:
    """Make a check of an object with any keys from that of its values."""

    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield from of("an object", lambda _: False)(value)
            return
        for key, item in value.items():
            yield from (f".{key}{wrong}" for wrong in each(item))

    return check


def entries(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Make a check of an object with known keys; others may stand beside them.

    Args:
        needed: Checks by key.
        optional: The same for keys that may be missing.

    Returns:
        The check.

    Example:
        >>> list(entries({"seed": COUNT, "data": TEXT})({"seed": -1}))
        ['.seed is -1; expected a whole number', '.data is missing']
    """
    checks = {**needed, **(optional or {})}

    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield from of("an object", lambda _: False)(value)
            return
        for key, item in checks.items():
            if key in value:
                yield from (f".{key}{wrong}" for wrong in item(value[key]))
            elif key in needed:
                yield f".{key} is missing"

    return check
