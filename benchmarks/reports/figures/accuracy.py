"""Figures of the accuracies that runs have measured: by method over time, and as matrices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.benchmarks.methods.method import grouped_methods
from cl_merge.benchmarks.reports.figures import style
from cl_merge.benchmarks.reports.figures.style import Drawing, Line
from cl_merge.benchmarks.reports.figures.suite_runs import Measured

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PANELS = {
    "sequential training": "merged, sequential training",
    "sequential, other mergers": "merged, sequential training",
    "independent training": "merged, independent training",
}
_LEAD = "magmax"

_Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each method its part of ``results.json``, one for each seed."""


_Curve = tuple[Line, dict[str, Any]]
"""A method's accuracy on everything seen, and how its line looks, with its label."""


def draw_curve(measured: Measured) -> Drawing | None:
    """Draw the accuracy on everything seen after each task; None if no method has several."""
    setting = measured.setting
    return draw_accuracies(setting.methods(), setting.tasks, setting.title)


def draw_accuracies(
    methods: _Results, tasks: int, what: str, *, columns: int = 1, fewest: int = 2
) -> Drawing | None:
    """Draw the accuracy on everything seen after each task, in panels of one training each.

    MagMax stands out in all of them, and plain sequential fine-tuning is in the panel of what
    merges it, so that one sees what merging gives. Only methods that were evaluated at least
    `fewest` times have a line; None if there is none but zero-shot.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    curves = _curves(methods, tasks, fewest)
    if set(curves) <= {"zero-shot"} and fewest > 1:
        return None
    titles = _titles(methods, curves)
    canvas, panels = style.new_panels(
        titles,
        2.1,
        edge=0.6,
        columns=columns,
        width=style.WIDTH * columns,
        lines=max(map(len, titles.values())),
    )
    for title, axes in panels.items():
        for name in titles[title]:
            line, look = curves[name]
            style.draw_line(axes, range(1, tasks + 1), line, **look)
        # A locator would put fractions around a single task.
        axes.xaxis.set_major_locator(
            MaxNLocator(8, integer=True) if tasks > 1 else FixedLocator([1])
        )
        axes.margins(x=0.02)
    for title, axes in panels.items():  # once the axes have their limits
        own = [curves[name] for name in titles[title]]
        ends = [(look["label"], tasks, float(line.mean[-1]), look["color"]) for line, look in own]
        style.label_ends(axes, [end for end in ends if math.isfinite(end[2])], bold=_LEAD)
    canvas.supxlabel("tasks learned")
    canvas.supylabel("accuracy on everything seen, %")
    seeds = max(map(len, methods.values()))
    after = sorted({max(1, round(tasks * part / 4)) for part in range(5)})
    points = [task - 1 for task in after]
    return Drawing(
        canvas,
        f"Accuracy while learning {what}",
        "Accuracy after each task on the test images of all tasks so far, among all classes of the "
        f"data set. Dotted: zero-shot, on the same images. {style.seeds_note(seeds)}",
        ("method", *(f"after {task}" for task in after), "spread at the end"),
        tuple(
            (name, *map(style.number, (*line.mean[points], line.spread[-1])))
            for name, (line, _) in curves.items()
        ),
    )


def _curves(methods: _Results, tasks: int, fewest: int) -> dict[str, _Curve]:
    curves = {}
    for name, results in methods.items():
        training, merger = results[0]["training"], results[0]["merger"]
        joint = training == "joint"
        # Joint training may have been counted by another number of tasks; all of them is the same.
        seen = [[None] * (tasks - 1) + [r["accuracy"]] if joint else r["seen"] for r in results]
        line = style.over_seeds(seen)
        if np.isfinite(line.mean).sum() >= fewest or joint:
            # In a panel of one training its name need not be said again.
            label = name.removesuffix("-sequential") if merger else name
            look: dict[str, Any] = {"label": label, "linewidth": 1.1, "alpha": 0.6}
            if name == _LEAD:
                look = {"label": label, "linewidth": 2.8, "zorder": 3}
            look |= style.look_of(merger, training, results[0].get("statistics"))
            look |= {"markersize": 9, "linestyle": ""} if joint else {}
            curves[name] = line, look
    return curves


def _titles(methods: _Results, curves: Collection[str]) -> dict[str, list[str]]:
    """By title of a panel its lines."""
    groups = grouped_methods({name: methods[name][0]["training"] for name in curves})
    titles: dict[str, list[str]] = {}
    for group, own in groups.items():
        titles.setdefault(_PANELS.get(group, group), []).extend(own)
    for title, own in titles.items():
        plain = ["sequential"] if title == _PANELS["sequential training"] else []
        every = dict.fromkeys([*own, _LEAD, "zero-shot", *plain])
        titles[title] = [name for name in every if name in curves]
    return titles


def draw_matrix(measured: Measured) -> Drawing | None:
    """Draw the accuracy matrices of all methods that were evaluated after every task."""
    setting = measured.setting
    methods = setting.methods(joint=False)
    matrices = _matrices(methods, setting.tasks)
    if not matrices:
        return None
    canvas, panels = style.new_panels(matrices, 1.6, edge=1.2, columns=3)
    ticks = sorted({1, setting.tasks, (setting.tasks + 1) // 2})
    for name, axes in panels.items():
        image = style.heat_map(axes, matrices[name])
        axes.set_title(name.replace("-sequential", "\nsequential"), fontsize=9.5)
        axes.axhline(0.5, color=style.INK, linewidth=1.2)  # below the row before any training
        axes.set_yticks([0, *ticks], ["0", *map(str, ticks)])
        axes.set_xticks([tick - 1 for tick in ticks], list(map(str, ticks)))
    canvas.supxlabel("accuracy on task")
    canvas.supylabel("after so many tasks; 0: zero-shot")
    style.scale_on_top(canvas, image, "accuracy, %")
    return Drawing(
        canvas,
        f"Accuracy matrices on {setting.title}",
        "Accuracy on each task (column) after each task (row), among all classes of the data set; "
        "the first row is zero-shot. Right of the diagonal are tasks that are still to come. "
        + style.seeds_note(max(map(len, methods.values())), band=False),
        ("method", "the task just learned", "earlier tasks at the end", "the next task"),
        tuple(_read_off(name, values[1:]) for name, values in matrices.items()),
    )


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


def _read_off(name: str, after: NDArray[np.float64]) -> tuple[str | float | None, ...]:
    """What can be read off a matrix in three numbers."""
    parts = np.diagonal(after), after[-1, :-1], np.diagonal(after, offset=1)
    return name, *(style.number(part.mean()) if part.size else None for part in parts)
