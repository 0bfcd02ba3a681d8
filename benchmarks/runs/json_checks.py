"""Checks of what a JSON file holds: they say what is wrong, behind the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
            yield _other(value, what)

    return check


def or_null(what: str, fits: Callable[[Any], bool]) -> Check:
    """Make the check of one value that may also be missing; as `of`."""
    return of(f"{what} or null", lambda value: value is None or fits(value))


def first(wrongs: Iterable[str]) -> str | None:
    """The first thing that is wrong, as a message says it; None if nothing is."""
    return next((wrong.removeprefix(".") for wrong in wrongs), None)


def _other(value: Any, what: str) -> str:
    shown = repr(value)
    return f" is {shown if len(shown) <= 40 else shown[:37] + '...'}; expected {what}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    # Neither infinity nor NaN, nor a whole number that is too large for a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_per_cent(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


TEXT = of("text", _is_text)
TEXT_OR_NULL = or_null("text", _is_text)
COUNT = of("a whole number", _is_count)
AMOUNT = of("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
FIGURE_OR_NULL = or_null("a finite number", _is_number)
PER_CENT = of("a number from 0 to 100", _is_per_cent)
PER_CENT_OR_NULL = or_null("a number from 0 to 100", _is_per_cent)
SCALE = of(
    "a number, numbers by pattern, or null",
    lambda value: (
        value is None
        or _is_number(value)
        or (isinstance(value, dict) and len(value) > 0 and all(map(_is_number, value.values())))
    ),
)


def list_of(each: Check) -> Check:
    """Make a check of a list that is not empty from that of its items."""

    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, list) or not value:
            yield _other(value, "a list")
            return
        for place, item in enumerate(value):
            yield from (f"[{place}]{wrong}" for wrong in each(item))

    return check


def mapping_of(each: Check) -> Check:
    """Make a check of an object with any keys from that of its values."""

    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _other(value, "an object")
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
            yield _other(value, "an object")
            return
        for key, item in checks.items():
            if key in value:
                yield from (f".{key}{wrong}" for wrong in item(value[key]))
            elif key in needed:
                yield f".{key} is missing"

    return check
