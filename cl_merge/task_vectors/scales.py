"""The scale: one factor of the merged task vector, or one for each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from cl_merge.errors import InputError, nearest
from cl_merge.task_vectors.task_vector import check_scale, moved

_REST = "*"
_BLOCK = re.compile(r"(?P<list>(?:|.*?\.)(?:\w*?_)?)(?P<number>\d+)\.")


@dataclass(frozen=True)
class Scales:
    """Factors of the merged task vector, by parameter name.

    Attributes:
        factors: Patterns with their factors, in the order in which they are tried; the last one,
            ``"*"``, fits every name.

    Example:
        >>> scales = Scales.read({"visual.*attn*": 0.3}, default=0.5)
        >>> scales.of("visual.attn.weight"), scales.of("visual.proj")
        (0.3, 0.5)
        >>> str(scales)
        '0.3-0.5'
    """

    factors: tuple[tuple[str, float], ...]

    @classmethod
    def read(cls, value: Any, default: float) -> Scales:
        """Read a scale as it was given.

        Args:
            value: None, a number, or a mapping from patterns on parameter names (``*``, ``?``,
                ``[abc]``) to numbers, of which the first that fits counts; ``*`` is for the rest,
                wherever it stands.
            default: For None, and for the names that no pattern fits.

        Returns:
            The scales.

        Raises:
            InputError: If something is not a finite number.
        """
        if isinstance(value, Scales):
            return value
        if value is None:
            value = default
        if not isinstance(value, Mapping):
            return cls(((_REST, check_scale(value)),))
        found = {str(pattern): _checked(pattern, number) for pattern, number in value.items()}
        rest = found.pop(_REST, default)
        return cls((*found.items(), (_REST, rest)))

    def of(self, name: str) -> float:
        """The factor of a parameter.

        Args:
            name: Its name.

        Returns:
            That of the first pattern that fits.
        """
        return next(number for pattern, number in self.factors if fnmatchcase(name, pattern))

    def check(self, names: Iterable[str]) -> None:
        """Make sure that every pattern fits something.

        Args:
            names: Of all parameters that are merged.

        Raises:
            InputError: If a pattern fits none; names it and the nearest name.
        """
        names = list(names)
        for pattern, _ in self.factors[:-1]:
            check_fits("scale", pattern, names)

    def plain(self) -> float | dict[str, float]:
        """What JSON and YAML can hold: a number, or a mapping that `read` reads again."""
        return self.factors[0][1] if len(self.factors) == 1 else dict(self.factors)

    def __str__(self) -> str:
        """A number for tables, or the range of the numbers."""
        numbers = sorted({number for _, number in self.factors})
        return "-".join(f"{number:g}" for number in dict.fromkeys((numbers[0], numbers[-1])))


def scaled(
    base: Mapping[str, Tensor], changes: Iterable[tuple[str, Tensor]], scales: Scales
) -> Iterator[tuple[str, Tensor]]:
    """Add the merged task vector to the base, a parameter at a time.

    Yields base + scale * change for some or all of the base, then, as they are, the weights that do
    not change.
    """
    rest = dict(base)
    for name, change in changes:
        yield name, moved(rest.pop(name), change, scales.of(name))
    yield from rest.items()


def lines_scales(names: Iterable[str], low: float, high: float) -> dict[str, float]:
    """Make scales that grow with the depth of a layer, from the first block to the last.

    Blocks are told by the first number that is a part of a name, or ends one after ``_``, as in
    ``visual.transformer.resblocks.3.mlp.c_fc.weight``; each list of blocks is taken by itself. What
    lies outside of blocks, as embeddings and heads, has the lower scale, as in the authors' code.

    Args:
        names: Of all parameters that are merged.
        low: Scale of the first block.
        high: Scale of the last block.

    Returns:
        Scales by pattern, for ``scale`` of `merge_checkpoints`, `MergeCallback` and others.

    Raises:
        InputError: If there are no blocks, or they are in stages, as those of a ResNet.

    Example:
        >>> lines_scales(["embed.weight", *(f"layers.{i}.weight" for i in range(3))], 0.2, 1.0)
        {'layers.0.*': 0.2, 'layers.1.*': 0.6, 'layers.2.*': 1.0, '*': 0.2}

    Reference:
        Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
        Merging, ICLR 2025.
    """
    low, high = check_scale(low), check_scale(high)
    blocks: dict[str, set[int]] = {}
    for name in names:
        if match := _BLOCK.match(name):
            blocks.setdefault(match["list"], set()).add(int(match["number"]))
    found = {}
    for place, numbers in blocks.items():
        if place[-2:-1].isdigit():
            raise InputError(
                f"lines: '{place}{min(numbers)}' is a block of a stage, whose depth its number "
                "does not tell; give scales by pattern"
            )
        first, last = min(numbers), max(numbers)
        for number in sorted(numbers) if first < last else ():
            depth = (number - first) / (last - first)
            found[f"{place}{number}.*"] = round(low + (high - low) * depth, 12)
    if not found:
        raise InputError(
            "lines: no name has a number that counts blocks, as in 'layers.3.weight'; give scales "
            "by pattern"
        )
    return {**found, _REST: low}


def check_fits(what: str, pattern: str, names: list[str]) -> None:
    """Make sure that a pattern, as of `fnmatch`, fits a name; `what` is what it is for."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise InputError(
            f"{what}: the pattern '{pattern}' fits no parameter{nearest(pattern, names)} Patterns "
            "fit whole names, as in 'visual.*'"
        )


def _checked(pattern: object, number: Any) -> float:
    try:
        return check_scale(number)
    except InputError as error:
        raise InputError(f"'{pattern}': {error}") from None
