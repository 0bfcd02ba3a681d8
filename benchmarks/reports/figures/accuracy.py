"""Figures of the accuracies that runs have measured: by method over time, and as matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.benchmarks.methods.method import GROUPS, grouped_methods
from cl_merge.benchmarks.reports.figures.figure import Drawing, Kind, Measured
from cl_merge.benchmarks.reports.figures.style import (
    INK,
    WIDTH,
    Line,
    draw_line,
    heat_map,
    label_ends,
    look_of,
    new_canvas,
    number,
    over_seeds,
    scale_on_top,
    seeds_note,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_PANELS = {
    "sequential training": "merged, sequential training",
    "sequential, other mergers": "merged, sequential training",
    "independent training": "merged, independent training",
}
_FIRST = next(iter(GROUPS))  # what is not merged
_LEAD = "magmax"

_Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each method its part of ``results.json``, one for each seed."""


@dataclass(frozen=True)
class _Curve:
    """A method's accuracy on everything seen, and how its line looks."""

    line: Line
    look: Mapping[str, Any]
    label: str


def draw_curve(measured: Measured) -> Drawing | None:
    """Draw the accuracy on everything seen after each task; None if no method has several."""
    setting = measured.setting
    return draw_accuracies(setting.methods(), setting.tasks, setting.title)


CURVE = Kind("curve", draw_curve)


def draw_accuracies(
    methods: _Results, tasks: int, title: str, *, columns: int = 1, fewest: int = 2
) -> Drawing | None:
    """Draw the accuracy on everything seen after each task, in panels of one training each.

    MagMax stands out in all of them, and plain sequential fine-tuning is in the panel of what
    merges it, so that one sees what merging gives. Only methods that were evaluated at least
    `fewest` times have a line; None if there is none but zero-shot.
    """
    curves = _curves(methods, tasks, fewest)
    if set(curves) <= {"zero-shot"} and fewest > 1:
        return None
    panels = _panels(methods, curves)
    rows = math.ceil(len(panels) / columns)
    canvas = new_canvas(0.6 + 2.1 * rows, WIDTH * columns)
    grid = list(canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, own) in zip(grid, panels.items(), strict=False):
        axes.set_title(name)
        _draw_panel(axes, own, tasks)
    for axes, own in zip(grid, panels.values(), strict=False):  # once the axes have their limits
        ends = [(c.label, tasks, float(c.line.mean[-1]), c.look["color"]) for c in own.values()]
        label_ends(axes, [end for end in ends if math.isfinite(end[2])], bold=_LEAD)
    canvas.supxlabel("tasks learned")
    canvas.supylabel("accuracy on everything seen, %")
    seeds = max(curve.line.seeds for curve in curves.values())
    return Drawing(
        canvas,
        f"Accuracy while learning {title}",
        "Accuracy after each task on the test images of all tasks so far, among all classes of the "
        f"data set. Dotted: zero-shot, on the same images. {seeds_note(seeds)}",
        *_curve_table(curves, tasks),
    )


def _draw_panel(axes: Axes, curves: Mapping[str, _Curve], tasks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = range(1, tasks + 1)
    for name, curve in curves.items():
        stands_out = {"linewidth": 2.8, "zorder": 3}
        accent = stands_out if name == _LEAD else {"linewidth": 1.1, "alpha": 0.6}
        draw_line(axes, steps, curve.line, curve.label, **{**accent, **curve.look})
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.02)


def _curves(methods: _Results, tasks: int, fewest: int) -> dict[str, _Curve]:
    curves = {}
    for name, results in methods.items():
        training, merger = results[0]["training"], results[0]["merger"]
        line = over_seeds([_seen(result, tasks) for result in results])
        if np.isfinite(line.mean).sum() >= fewest or training == "joint":
            # In a panel of one training its name need not be said again.
            label = name.removesuffix("-sequential") if merger else name
            look = look_of(merger, training, results[0].get("statistics"))
            look |= {"markersize": 9, "linestyle": ""} if training == "joint" else {}
            curves[name] = _Curve(line, look, label)
    return curves


def _seen(result: Mapping[str, Any], tasks: int) -> list[float | None]:
    # Joint training may have been counted by another number of tasks; all of them is the same.
    if result["training"] == "joint":
        return [None] * (tasks - 1) + [result["accuracy"]]
    seen: list[float | None] = result["seen"]
    return seen


def _panels(methods: _Results, curves: Mapping[str, _Curve]) -> dict[str, dict[str, _Curve]]:
    """By title the lines of a panel."""
    trainings = {name: methods[name][0]["training"] for name in curves}
    names: dict[str, list[str]] = {}
    for group, own in grouped_methods(trainings).items():
        names.setdefault(_PANELS.get(group, group), []).extend(own)
    for title, own in names.items():
        own += [_LEAD, "zero-shot"]
        if title == _PANELS["sequential training"]:
            own.append("sequential")
    return {
        title: {name: curves[name] for name in own if name in curves}
        for title, own in names.items()
    }


def _curve_table(curves: Mapping[str, _Curve], tasks: int) -> tuple[Any, Any]:
    after = sorted({max(1, round(tasks * part / 4)) for part in range(5)})
    rows = tuple(
        (name, *(number(c.line.mean[task - 1]) for task in after), number(c.line.spread[-1]))
        for name, c in curves.items()
    )
    return ("method", *(f"after {task}" for task in after), "spread at the end"), rows


_COLUMNS = 3


def draw_matrix(measured: Measured) -> Drawing | None:
    """Draw the accuracy matrices of all methods that were evaluated after every task."""
    setting = measured.setting
    methods = setting.methods(joint=False)
    matrices = _matrices(methods, setting.tasks)
    if not matrices:
        return None
    rows = math.ceil(len(matrices) / _COLUMNS)
    canvas = new_canvas(1.2 + 1.6 * rows)
    grid = list(canvas.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    ticks = sorted({1, setting.tasks, (setting.tasks + 1) // 2})
    for axes in grid[len(matrices) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid, matrices.items(), strict=False):
        image = heat_map(axes, values)
        axes.set_title(name.replace("-sequential", "\nsequential"), fontsize=9.5)
        axes.tick_params(length=2)
        axes.axhline(0.5, color=INK, linewidth=1.2)  # below the row before any training
        axes.set_yticks([0, *ticks], ["0", *map(str, ticks)])
        axes.set_xticks([tick - 1 for tick in ticks], list(map(str, ticks)))
    canvas.supxlabel("accuracy on task")
    canvas.supylabel("after so many tasks; 0: zero-shot")
    scale_on_top(canvas, image, "accuracy, %")
    return Drawing(
        canvas,
        f"Accuracy matrices on {setting.title}",
        "Accuracy on each task (column) after each task (row), among all classes of the data set; "
        "the first row is zero-shot. Right of the diagonal are tasks that are still to come. "
        + seeds_note(max(map(len, methods.values())), band=False),
        *_matrix_table(matrices),
    )


MATRIX = Kind("matrix", draw_matrix)


def _matrices(
    methods: Mapping[str, list[dict[str, Any]]], tasks: int
) -> dict[str, NDArray[np.float64]]:
    """By method, means over seeds, float64 [T + 1, T], zero-shot first."""
    means = {}
    for name, results in methods.items():
        every = [np.array(result["matrix"], dtype=float) for result in results]
        # Seeds may have classes in other orders: a cell is of a position in the stream.
        square = [matrix for matrix in every if matrix.shape == (tasks, tasks)]
        if square:
            means[name] = np.mean(square, axis=0)
    zero_shot = means.pop("zero-shot", np.full((1, tasks), np.nan))[:1]
    return {name: np.concatenate([zero_shot, matrix]) for name, matrix in means.items()}


def _matrix_table(matrices: Mapping[str, NDArray[np.float64]]) -> tuple[Any, Any]:
    """What can be read off a matrix in three numbers."""
    rows = []
    for name, values in matrices.items():
        after = values[1:]
        new, old = np.diagonal(after), after[-1, :-1]
        coming = np.diagonal(after, offset=1)
        rows.append((name, *(number(_mean(part)) for part in (new, old, coming))))
    columns = ("method", "the task just learned", "earlier tasks at the end", "the next task")
    return columns, tuple(rows)


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.mean(values)) if np.size(values) else float("nan")
