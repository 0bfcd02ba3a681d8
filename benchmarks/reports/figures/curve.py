"""Accuracy on everything seen after each task, a line per method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cl_merge.benchmarks.methods.method import GROUPS, grouped_methods
from cl_merge.benchmarks.reports.figures.figure import Drawn, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.runs import Setting
from cl_merge.benchmarks.reports.figures.seeds import Line, number, over_seeds, seeds_note
from cl_merge.benchmarks.reports.figures.style import (
    draw_line,
    legend_beside,
    look_of,
    new_canvas,
    whole_steps,
)

_PANELS = {
    "sequential training": "merged, sequential training",
    "sequential, other mergers": "merged, sequential training",
    "independent training": "merged, independent training",
}


def draw_curve(measured: Sequence[Measured]) -> Drawn | None:
    """Draw the accuracy on everything seen.

    Args:
        measured: One setting; its results are all that counts.

    Returns:
        The figure; None if no method was evaluated after every task.
    """
    setting = measured[0].setting
    lines = _lines(setting)
    panels = _panels(setting, lines)
    if not panels:
        return None
    canvas = new_canvas(0.6 + 1.9 * len(panels))
    all_axes = canvas.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    steps = range(1, setting.tasks + 1)
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(title)
        for name in names:
            line, look, label = lines[name]
            draw_line(axes, steps, line, label, look)
        legend_beside(axes)
    all_axes[-1].set_xlabel("tasks learned")
    whole_steps(all_axes[-1])
    canvas.supylabel("accuracy on everything seen, %", fontsize=10)
    seeds = max(line.seeds for line, *_ in lines.values())
    return Drawn(
        canvas,
        f"Accuracy while learning {setting.title}",
        "Accuracy after each task on the test images of all tasks so far, among all classes of the "
        f"data set. Dotted: zero-shot, on the same images. {seeds_note(seeds)}",
        _alt(setting, lines),
        _table(setting, lines),
    )


CURVE = Kind("curve", draw_curve)


def _lines(setting: Setting) -> dict[str, tuple[Line, dict[str, Any], str]]:
    """By method: its line, its look and what the legend of its panel calls it."""
    lines = {}
    for name, results in setting.methods().items():
        training, merger = results[0]["training"], results[0]["merger"]
        values = [_seen(result, setting.tasks) for result in results]
        line = over_seeds(values)
        if sum(math.isfinite(value) for value in line.means) > 1 or training == "joint":
            # In a panel of one training its name need not be said again.
            label = name.removesuffix("-sequential") if merger else name
            look = look_of(merger, training, results[0].get("statistics"))
            look |= {"markersize": 9, "linestyle": ""} if training == "joint" else {}
            lines[name] = (line, look, label)
    return lines


def _seen(result: Mapping[str, Any], tasks: int) -> list[float | None]:
    # Joint training may have been counted by another number of tasks; all of them is the same.
    if result["training"] == "joint":
        return [None] * (tasks - 1) + [result["accuracy"]]
    seen: list[float | None] = result["seen"]
    return seen


def _panels(setting: Setting, lines: Mapping[str, Any]) -> dict[str, list[str]]:
    trainings = {
        name: results[0]["training"] for name, results in setting.methods().items() if name in lines
    }
    panels: dict[str, list[str]] = {}
    for group, names in grouped_methods(trainings).items():
        panels.setdefault(_PANELS.get(group, group), []).extend(names)
    first = next(iter(GROUPS))
    if "zero-shot" in lines:
        for title, names in panels.items():
            if title != first:
                names.append("zero-shot")
    return panels if any(name != "zero-shot" for name in lines) else {}


def _alt(setting: Setting, lines: Mapping[str, tuple[Line, Any, str]]) -> str:
    ends = sorted(
        ((line.means[-1], name) for name, (line, *_) in lines.items() if line.means[-1] > 0),
        reverse=True,
    )
    said = ", ".join(f"{name} {value:.1f} %" for value, name in ends)
    return f"Lines of accuracy against tasks learned. After all {setting.tasks}: {said}."


def _table(setting: Setting, lines: Mapping[str, tuple[Line, Any, str]]) -> Table:
    last = setting.tasks
    after = sorted({max(1, round(last * part / 4)) for part in range(5)})
    rows = [
        (name, *(number(line.means[task - 1]) for task in after), number(line.spreads[-1]))
        for name, (line, *_) in lines.items()
    ]
    heads = (*(f"after {task}" for task in after), "spread at the end")
    return Table(("method", *heads), tuple(rows))
