"""Means and spreads over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Line:
    """A line of a figure over the seeds of a setting.

    Attributes:
        means: At each point; NaN where no seed has a value.
        spreads: Sample standard deviations; NaN where fewer than two seeds have a value.
        seeds: How many there are.
    """

    means: tuple[float, ...]
    spreads: tuple[float, ...]
    seeds: int

    @property
    def lower(self) -> list[float]:
        """Mean less spread."""
        return [m - s for m, s in zip(self.means, self.spreads, strict=True)]

    @property
    def upper(self) -> list[float]:
        """Mean plus spread."""
        return [m + s for m, s in zip(self.means, self.spreads, strict=True)]


def over_seeds(values: Sequence[Sequence[float | None]]) -> Line:
    """Average lines over seeds, point by point.

    Args:
        values: A line for each seed, of equal lengths; None where it has no value.

    Returns:
        The line of means.

    Example:
        >>> over_seeds([[1.0, 2.0], [3.0, None]]).means
        (2.0, 2.0)
    """
    points = [
        [value for value in point if value is not None] for point in zip(*values, strict=True)
    ]
    return Line(
        tuple(mean(point) if point else math.nan for point in points),
        tuple(stdev(point) if len(point) > 1 else math.nan for point in points),
        len(values),
    )


def number(value: float, digits: int = 1) -> float | None:
    """Round a number for a table.

    Args:
        value: The number.
        digits: After the point.

    Returns:
        None if it is not finite.
    """
    return round(value, digits) if math.isfinite(value) else None


def seeds_note(seeds: int) -> str:
    """Say what bands mean.

    Args:
        seeds: How many there are.

    Returns:
        A sentence for a caption.
    """
    if seeds < 2:
        return "One seed."
    return f"Mean over {seeds} seeds; the band is one standard deviation to each side."
