"""Search for the scale that gets most of some images right; pure, knows no model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cl_merge.errors import InputError, unknown_name
from cl_merge.task_vectors.scales import Scales

Count = Callable[[Scales], int]
"""Counts the images that are classified correctly at a scale."""

# Scales are multiples of 1/80, so that sums of steps are exact and none is asked for twice.
_UNIT = 80
_COARSE = range(8, 121, 16)  # 0.1, 0.3, ... 1.5
_HIGHEST = 248  # 3.1
_HALVINGS = (8, 4, 2, 1)
_GROUP_MOVES = (-8, 8, -16, 16)


@dataclass(frozen=True)
class FoundScale:
    """What a search found.

    Attributes:
        scales: The best scale.
        correct: How many images it gets right.
        evaluated: How many scales were tried.
    """

    scales: Scales
    correct: int
    evaluated: int


def search_scale(count: Count, *, groups: Iterable[str] = ()) -> FoundScale:
    """Find the scale with the highest count; the same counts give the same scale.

    One factor for all: first 0.1, 0.3, 0.5 and so on to 1.5, higher while the highest is the best,
    up to 3.1. Then the neighbours of the best in steps of 0.1 and 0.05, and below 0.1 in steps of
    down to 0.0125, where they matter as much. Of equal counts the middle of the longest plateau is
    taken, the smaller one of two: a plateau's edge is next to a fall that other images may see
    earlier. This tries 12 scales as a rule.

    With groups, the factor of one group after another is moved by 0.1 and 0.2 up and down from the
    common one, and a move stays if it gets strictly more images right: four more for each group.

    Args:
        count: Counts, called once for each scale.
        groups: Patterns on parameter names, each a group with a factor of its own; `block_groups`
            makes some.

    Returns:
        The best scale, with its count.

    Example:
        >>> found = search_scale(lambda scales: 100 - int(100 * abs(scales.of("weight") - 0.42)))
        >>> str(found.scales), found.correct, found.evaluated
        ('0.4', 99, 12)
    """
    once = functools.cache(count)
    best = _common(once)
    scales, correct = _plain(best), once(_plain(best))
    factors = dict.fromkeys(groups, best)
    for group, at in factors.items():
        for move in _GROUP_MOVES:
            tried = _grouped(factors | {group: max(at + move, 0)}, best)
            if once(tried) > correct:
                scales, correct = tried, once(tried)
                factors[group] = max(at + move, 0)
    return FoundScale(scales, correct, once.cache_info().currsize)


def block_groups(names: Iterable[str]) -> list[str]:
    """Group parameters by the numbered block that they belong to.

    Args:
        names: Names of parameters.

    Returns:
        A pattern for each block, in the order of the names, and ``"*"`` for what is in none.

    Example:
        >>> block_groups(["conv.weight", "blocks.0.fc.weight", "blocks.0.fc.bias", "blocks.1.w"])
        ['blocks.0.*', 'blocks.1.*', '*']
    """
    names = list(names)
    found = [re.match(r"(.*?\.)?\d+\.", name) for name in names]
    blocks = list(dict.fromkeys(f"{block[0]}*" for block in found if block))
    return [*blocks, "*"] if None in found else blocks


def read_groups(given: Any) -> str | tuple[str, ...]:
    """Read the choice of groups: None or nothing, ``"block"``, or a list of patterns."""
    if given is None or given == "block":
        return given or ()
    if isinstance(given, str):
        raise unknown_name("grouping", given, ["block"])
    if isinstance(given, Iterable) and all(isinstance(pattern, str) for pattern in given):
        return tuple(given)
    raise InputError(f"groups={given!r}; expected 'block' or a list of patterns")


def _common(count: Count) -> int:
    """The best single scale, in units."""
    tried = set(_COARSE)
    best = _best(count, tried)
    while best == max(tried) and best < _HIGHEST:
        tried.add(best + _COARSE.step)
        best = _best(count, tried)
    for step in _HALVINGS:
        # Steps matter relative to the scale; small ones only where it is small.
        if step >= _UNIT // 20 or 2 * step >= best:
            tried |= {max(best - step, 0), best + step}
            best = _best(count, tried)
    return best


def _best(count: Count, tried: Iterable[int]) -> int:
    """The middle of the longest plateau at the highest count."""
    ordered = sorted(tried)
    found = [count(_plain(scale)) for scale in ordered]
    plateaus: list[list[int]] = [[]]
    for scale, correct in zip(ordered, found, strict=True):
        if correct == max(found):
            plateaus[-1].append(scale)
        elif plateaus[-1]:
            plateaus.append([])
    longest = max(filter(None, plateaus), key=lambda plateau: plateau[-1] - plateau[0])
    middle = longest[0] + longest[-1]
    return min(longest, key=lambda scale: (abs(2 * scale - middle), scale))


def _plain(scale: int) -> Scales:
    return Scales.read(scale / _UNIT, 0.0)


def _grouped(factors: Mapping[str, int], rest: int) -> Scales:
    plain = {pattern: scale / _UNIT for pattern, scale in factors.items()}
    return Scales.read(plain, rest / _UNIT)
