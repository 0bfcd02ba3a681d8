"""Figures as a page shows them: rounded, ranked, beside the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.reports.summary import Entry, Figure, Summary, ranked
from cl_merge.benchmarks.reports.tables import UNITS
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, NEW

_DIGITS = {"stored_bytes": 0}
# What a method is better for, and whether more is better. The rest is of a run, not of a method.
_QUALITY = {
    "accuracy": True,
    "average_accuracy": True,
    "task_aware_accuracy": True,
    "average_incremental_accuracy": True,
    "forgetting": False,
    "backward_transfer": True,
    "forward_transfer": True,
}
_STRENGTHS = (1.0, 3.0)  # points from which a difference to the paper counts as larger

STATES = {DONE: "done", FAILED: "failed", BEGUN: "unfinished", NEW: "not run"}
"""How far a run is, in the words of a page."""

_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Shown:
    """A figure over seeds, in the words of a page.

    Attributes:
        order: What rows are sorted by.
        mean: The mean, rounded.
        spread: Its standard deviation over seeds; empty for fewer than two.
        seeds: How many of the seeds it is of, such as ``"1 of 3"``; empty if of all.
        rank: 1 or 2 for the best and the second best of the methods that merge.
        values: One for each of the entry's cells; empty where there is none.
    """

    order: float
    mean: str
    spread: str
    seeds: str
    rank: int | None
    values: tuple[str, ...]


@dataclass(frozen=True)
class Paper:
    """The paper's accuracy beside ours.

    Attributes:
        value: The paper's.
        difference: Ours less the paper's, with its sign; empty if there is no figure of ours.
        strength: From -3 to 3, how far and which way ours is from it.
    """

    value: str
    difference: str
    strength: int


def shown(summary: Summary, metric: str) -> dict[tuple[str, str], Shown]:
    """Put the figures of a metric into words.

    Args:
        summary: Of a suite.
        metric: One of ``METRICS``.

    Returns:
        By setting's name and method; those without a figure are left out.
    """
    ranks = _ranks(summary, metric)
    return {
        key: _shown(entry, entry.figures[metric], metric, ranks.get(key))
        for key, entry in summary.entries.items()
        if metric in entry.figures
    }


def beside_paper(entry: Entry) -> Paper | None:
    """Compare an entry with the paper.

    Args:
        entry: A place in the table.

    Returns:
        The comparison; None if the paper does not have it.
    """
    if entry.paper is None:
        return None
    value = number(entry.paper, 1)
    if "accuracy" not in entry.figures:
        return Paper(value, "", 0)
    difference = round(entry.figures["accuracy"].mean - entry.paper, 1)
    if difference == 0:
        return Paper(value, "0.0", 0)
    strength = 1 + sum(abs(difference) >= least for least in _STRENGTHS)
    sign = "+" if difference > 0 else ""
    return Paper(value, sign + number(difference, 1), int(math.copysign(strength, difference)))


def gap(entry: Entry) -> str:
    """Say why an entry has no figure.

    Args:
        entry: A place in the table.

    Returns:
        A word for it.
    """
    states = {cell.state for cell in entry.cells}
    if DONE in states:
        return _DASH
    return next(word for state, word in STATES.items() if state in states)


def merges(entry: Entry) -> bool:
    """Whether the method of an entry is known to merge."""
    return any(cell.result.get("merger") for cell in entry.cells)


def number(value: float, digits: int) -> str:
    """Write a number with a true minus sign, and never a negative zero.

    Args:
        value: The number.
        digits: After the point.

    Returns:
        The text.

    Example:
        >>> number(-1.25, 1), number(-0.01, 1)
        ('−1.2', '0.0')
    """
    return rounded(value, digits).replace("-", _MINUS)


def _shown(entry: Entry, figure: Figure, metric: str, rank: int | None) -> Shown:
    unit, digits = UNITS.get(metric, 1.0), _DIGITS.get(metric, 1)
    found, wanted = len(figure.values), len(entry.cells)
    values = (figure.values.get(cell.cell.seed) for cell in entry.cells)
    return Shown(
        order=float(f"{figure.mean:.8g}"),
        mean=number(figure.mean / unit, digits),
        spread="" if math.isnan(figure.spread) else number(figure.spread / unit, digits),
        seeds="" if found == wanted else f"{found} of {wanted}",
        rank=rank,
        values=tuple("" if v is None else number(v / unit, digits + 1) for v in values),
    )


def _ranks(summary: Summary, metric: str) -> dict[tuple[str, str], int]:
    if metric == "accuracy":
        return {key: e.rank for key, e in summary.entries.items() if e.rank is not None}
    if metric not in _QUALITY:
        return {}
    ranks: dict[tuple[str, str], int] = {}
    sign = 1 if _QUALITY[metric] else -1
    for setting in summary.suite.settings:
        own = {
            key: sign * entry.figures[metric].mean
            for key, entry in summary.entries.items()
            if key[0] == setting.name and metric in entry.figures and merges(entry)
        }
        ranks |= ranked(own)
    return ranks
