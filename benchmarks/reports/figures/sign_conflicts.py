"""How often tasks disagree on the sign of their largest changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cl_merge.analysis import sign_conflict_curve
from cl_merge.benchmarks.reports.figures.figure import Drawn, Found, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.runs import SuiteRun
from cl_merge.benchmarks.reports.figures.seeds import Line, number, over_seeds, seeds_note
from cl_merge.benchmarks.reports.figures.style import (
    draw_line,
    legend_below,
    new_canvas,
    whole_steps,
)
from cl_merge.benchmarks.reports.figures.trainings import PLAIN, look_of_training

_DENSITY = 0.2
_WHAT = (
    "Each task vector is trimmed to its 20 % of largest magnitude, over all parameters. Of the "
    "positions that at least one of them keeps, the share where one keeps a positive and another a "
    "negative value."
)


def measure_sign_conflicts(run: SuiteRun, _: Callable[[], Any]) -> Found:
    """Measure the conflicts among the first task vectors, for every number of them.

    Args:
        run: The run.

    Returns:
        ``conflicts``: shares, 0 to 1, after each task.
    """
    return {"conflicts": sign_conflict_curve(run.vectors(), _DENSITY)}


def draw_over_time(measured: Sequence[Measured]) -> Drawn | None:
    """Draw the conflicts against the number of tasks so far.

    Args:
        measured: One setting.

    Returns:
        The figure; None if there is a single task or nothing was measured.
    """
    setting = measured[0].setting
    lines = measured[0].by_training(
        lambda found: over_seeds([of_seed["conflicts"][1:] for of_seed in found])
    )
    if not lines or setting.tasks < 2:
        return None
    return _draw(
        list(range(2, setting.tasks + 1)),
        lines,
        "task vectors compared",
        f"Sign conflicts on {setting.title}",
        f"{_WHAT} Among the task vectors of the first so many tasks.",
    )


def draw_over_settings(measured: Sequence[Measured]) -> Drawn | None:
    """Draw the conflicts against the number of tasks that a data set was cut into.

    Args:
        measured: Settings of one data set, by number of tasks.

    Returns:
        The figure; None if they are fewer than two.
    """
    cut = [m for m in measured if m.found and m.setting.tasks > 1]
    tasks = [m.setting.tasks for m in cut]
    if len(set(tasks)) < 2:
        return None
    lines = {}
    for training in PLAIN:
        points = [
            over_seeds([found["conflicts"][-1:] for found in m.over_seeds(training)] or [[None]])
            for m in cut
        ]
        lines[training] = Line(
            tuple(point.means[0] for point in points),
            tuple(point.spreads[0] for point in points),
            max(point.seeds for point in points),
        )
    return _draw(
        tasks,
        lines,
        "tasks that the data set is cut into",
        f"Sign conflicts on {cut[0].setting.data} by number of tasks",
        f"{_WHAT} Among the task vectors of all tasks.",
    )


SIGN_CONFLICTS = Kind(
    "sign-conflicts",
    draw_over_time,
    measure_sign_conflicts,
    trainings=PLAIN,
    options={"density": _DENSITY},
)
SIGN_CONFLICTS_BY_TASKS = Kind(
    "sign-conflicts-by-tasks", draw_over_settings, compares=True, source=SIGN_CONFLICTS.name
)


def _draw(x: list[int], lines: dict[str, Line], label: str, title: str, caption: str) -> Drawn:
    canvas = new_canvas(3.0)
    axes = canvas.add_subplot()
    per_cent = {training: _times(line, 100) for training, line in lines.items()}
    for training, line in per_cent.items():
        draw_line(axes, x, line, training, look_of_training(training))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("positions in conflict, %")
    if len(x) > 8:
        whole_steps(axes)
    else:
        axes.set_xticks(x)
    legend_below(canvas, axes)
    ends = ", ".join(f"{name} training {line.means[-1]:.1f} %" for name, line in per_cent.items())
    columns = [label, *per_cent]
    rows = [
        (float(at), *(number(line.means[i]) for line in per_cent.values()))
        for i, at in enumerate(x)
    ]
    seeds = max(line.seeds for line in lines.values())
    return Drawn(
        canvas,
        title,
        f"{caption} {seeds_note(seeds)}",
        f"Share of positions in conflict against {label}. At {x[-1]}: {ends}.",
        Table(tuple(columns), tuple(rows)),
    )


def _times(line: Line, factor: float) -> Line:
    return Line(
        tuple(factor * value for value in line.means),
        tuple(factor * value for value in line.spreads),
        line.seeds,
    )
