"""How large parameters have become, against how consistently tasks moved them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

from cl_merge.analysis import direction_consistency
from cl_merge.benchmarks.reports.figures.figure import Drawn, Found, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.runs import SuiteRun
from cl_merge.benchmarks.reports.figures.seeds import number, over_seeds, seeds_note
from cl_merge.benchmarks.reports.figures.style import GREY, draw_line, legend_below, new_canvas
from cl_merge.benchmarks.reports.figures.trainings import PLAIN, look_of_training

_BINS = 10


def measure_consistency(run: SuiteRun, _: Callable[[], Any]) -> Found:
    """Measure the consistency of the tasks' updates by magnitude of the merge.

    Args:
        run: The run.

    Returns:
        ``upper``, ``counts`` and ``consistency`` of the bins, see
        `cl_merge.analysis.DirectionConsistency`.
    """
    found = direction_consistency(run.vectors(), _BINS, sequential=run.training != "independent")
    return {
        "upper": list(found.upper),
        "counts": list(found.counts),
        "consistency": list(found.consistency),
    }


def draw_consistency(measured: Sequence[Measured]) -> Drawn | None:
    """Draw the consistency against the magnitude.

    Args:
        measured: One setting.

    Returns:
        The figure; None if there is a single task or nothing was measured.
    """
    setting = measured[0].setting
    lines = measured[0].by_training(
        lambda found: over_seeds([of_seed["consistency"] for of_seed in found])
    )
    if not lines or setting.tasks < 2:
        return None
    canvas = new_canvas(3.2)
    axes = canvas.add_subplot()
    middles = [100 * (i + 0.5) / _BINS for i in range(_BINS)]
    for training, line in lines.items():
        draw_line(axes, middles, line, training, look_of_training(training))
    chance = random_consistency(setting.tasks)
    axes.axhline(chance, color=GREY, linestyle=(0, (1, 1.5)), label="random signs")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, 100)
    axes.set_xlabel("magnitude of the merged parameter, percentile")
    axes.set_ylabel("consistency of direction")
    legend_below(canvas, axes, 3)
    seeds = max(line.seeds for line in lines.values())
    ends = "; ".join(
        f"{name} training from {line.means[0]:.2f} for the smallest to {line.means[-1]:.2f} for "
        "the largest"
        for name, line in lines.items()
    )
    bins = [f"{100 * i // _BINS}-{100 * (i + 1) // _BINS} %" for i in range(_BINS)]
    rows = [
        (name, *(number(line.means[i], 3) for line in lines.values()))
        for i, name in enumerate(bins)
    ]
    return Drawn(
        canvas,
        f"Magnitude and consistency on {setting.title}",
        "The parameters of the max-magnitude merge in ten equal parts by magnitude. Consistency is "
        "the absolute sum of the signs of a parameter's updates by the tasks, divided by their "
        "number: 1 if every task moved it the same way. An update is the change by one task alone. "
        f"Dotted: what {setting.tasks} random signs give. {seeds_note(seeds)}",
        f"Consistency of direction against magnitude: {ends}; random signs give {chance:.2f}.",
        Table(("magnitude", *lines), tuple(rows)),
    )


CONSISTENCY = Kind(
    "consistency",
    draw_consistency,
    measure_consistency,
    trainings=PLAIN,
    options={"bins": _BINS},
)


def random_consistency(tasks: int) -> float:
    """The expected consistency of random signs.

    Args:
        tasks: How many, each up or down with equal chance.

    Returns:
        The expectation of the absolute sum of so many random signs, divided by their number.

    Example:
        >>> random_consistency(1), random_consistency(2), random_consistency(3)
        (1.0, 0.5, 0.5)
    """
    return comb(tasks - 1, (tasks - 1) // 2) / 2.0 ** (tasks - 1)
