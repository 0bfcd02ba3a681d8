"""Figures of what stored task vectors are like: their conflicts, consistency and origins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import takewhile, zip_longest
from math import comb
from typing import Any

import numpy as np

from cl_merge.analysis import direction_consistency, origin_counts, sign_conflict_curve
from cl_merge.benchmarks.reports.figures import style
from cl_merge.benchmarks.reports.figures.style import Drawing, Line
from cl_merge.benchmarks.reports.figures.suite_runs import PLAIN, Measured, Measures, SuiteRun

DENSITY = 0.2
"""To which task vectors are trimmed before their signs are compared."""

_CONFLICTS = (
    "Each task vector is trimmed to its 20 % of largest magnitude, over all parameters. Of the "
    "positions that at least one of them keeps, the share where one keeps a positive and another a "
    "negative value."
)


def measure_sign_conflicts(run: SuiteRun, _: Callable[[], Any]) -> Measures:
    """Measure how often the first task vectors disagree, for every number of them, 0 to 1."""
    return {"conflicts": sign_conflict_curve(run.vectors(), DENSITY)}


def draw_conflicts_over_time(measured: Measured) -> Drawing | None:
    """Draw the sign conflicts against the number of tasks so far; None for a single task."""
    setting = measured.setting
    lines = measured.by_training(
        lambda found: style.over_seeds([[100 * x for x in one["conflicts"][1:]] for one in found])
    )
    if not lines or setting.tasks < 2:
        return None
    return _draw_conflicts(
        list(range(2, setting.tasks + 1)),
        lines,
        "task vectors compared",
        f"Sign conflicts on {setting.title}",
        f"{_CONFLICTS} Among the task vectors of the first so many tasks. "
        f"{style.seeds_note(measured.seeds)}",
    )


def draw_conflicts_over_settings(*measured: Measured) -> Drawing | None:
    """Draw the sign conflicts against the number of tasks that a data set was cut into."""
    cut = [m for m in measured if m.found and m.setting.tasks > 1 and not m.setting.order]
    tasks = [m.setting.tasks for m in cut]
    if len(set(tasks)) < 2:
        return None
    lines = {}
    for training in PLAIN:
        ends = [[100 * one["conflicts"][-1] for one in m.found.get(training, [])] for m in cut]
        # Seeds by settings, with nothing where a setting has fewer of them.
        padded = list(zip_longest(*ends))
        if padded:
            lines[training] = style.over_seeds(padded)
    return _draw_conflicts(
        tasks,
        lines,
        "tasks that the data set is cut into",
        f"Sign conflicts on {cut[0].setting.data} by number of tasks",
        f"{_CONFLICTS} Among the task vectors of all tasks. "
        f"{style.seeds_note(max(m.seeds for m in cut))}",
    )


def _draw_conflicts(
    x: list[int], lines: dict[str, Line], label: str, title: str, caption: str
) -> Drawing:
    from matplotlib.ticker import MaxNLocator

    canvas, axes = _draw_trainings(x, lines, 3.0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=label, ylabel="positions in conflict, %", xticks=x)
    if len(x) > 8:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    style.legend_below(canvas)
    rows = style.rows_of_lines(list(map(float, x)), lines.values())
    return Drawing(canvas, title, caption, (label, *lines), rows)


def _draw_trainings(x: Sequence[float], lines: dict[str, Line], height: float) -> tuple[Any, Any]:
    """Draw a line for each training; the canvas and its axes."""
    canvas = style.new_canvas(height)
    axes = canvas.add_subplot()
    for training, line in lines.items():
        # Nothing is merged here: a training looks as what it is merged with.
        look = style.look_of("magmax" if training == "sequential" else "average", training)
        style.draw_line(axes, x, line, training, **look)
    return canvas, axes


BINS = 10
"""Parts of the merged parameters by magnitude, each with as many."""


def measure_consistency(run: SuiteRun, _: Callable[[], Any]) -> Measures:
    """Measure the consistency of the tasks' updates by magnitude of the merge.

    The keys are as in `cl_merge.analysis.DirectionConsistency`.
    """
    sequential = run.training != "independent"
    return asdict(direction_consistency(run.vectors(), BINS, sequential=sequential))


def draw_consistency(measured: Measured) -> Drawing | None:
    """Draw how consistently tasks moved parameters against how large these have become."""
    setting = measured.setting
    lines = measured.by_training(
        lambda found: style.over_seeds([one["consistency"] for one in found])
    )
    if not lines or setting.tasks < 2:
        return None
    middles = [100 * (i + 0.5) / BINS for i in range(BINS)]
    canvas, axes = _draw_trainings(middles, lines, 3.2)
    chance = random_consistency(setting.tasks)
    axes.axhline(chance, color=style.GREY, linestyle=style.DOTTED, label="random signs")
    axes.set(xlabel="magnitude of the merged parameter, percentile", xlim=(0, 100))
    axes.set(ylabel="consistency of direction", ylim=(0, 1))
    style.legend_below(canvas, 3)
    bins = [f"{100 * i // BINS}-{100 * (i + 1) // BINS} %" for i in range(BINS)]
    return Drawing(
        canvas,
        f"Magnitude and consistency on {setting.title}",
        "The parameters of the max-magnitude merge in ten equal parts by magnitude. Consistency is "
        "the absolute sum of the signs of a parameter's updates by the tasks, divided by their "
        "number: 1 if every task moved it the same way. An update is the change by one task alone. "
        f"Dotted: what {setting.tasks} random signs give. {style.seeds_note(measured.seeds)}",
        ("magnitude", *lines),
        style.rows_of_lines(bins, lines.values(), digits=3),
    )


def random_consistency(tasks: int) -> float:
    """The expected absolute sum of so many random signs, divided by their number.

    Example:
        >>> random_consistency(1), random_consistency(2), random_consistency(3)
        (1.0, 0.5, 0.5)
    """
    return comb(tasks - 1, (tasks - 1) // 2) / 2.0 ** (tasks - 1)


def measure_origins(run: SuiteRun, _: Callable[[], Any]) -> Measures:
    """Count from which task the merged parameters come, by part of the network in its order."""
    counts = origin_counts(run.vectors())
    parts: dict[str, list[int]] = {}
    for part, name in zip(parts_of(counts), counts, strict=True):
        former = parts.get(part, [0] * run.tasks)
        parts[part] = [a + b for a, b in zip(former, counts[name], strict=True)]
    # Pairs, for the order: files of task vectors are sorted by name.
    return {"parts": [[part, parts[part]] for part in sorted(parts, key=_position)]}


def draw_origins(measured: Measured) -> Drawing | None:
    """Draw a bar for every part of the network, cut by the task that parameters come from."""
    from matplotlib import cm, colormaps, colors

    setting, tasks = measured.setting, measured.setting.tasks
    shares = measured.by_training(_shares)
    if not shares:
        return None
    parts = next(iter(shares.values()))[0]
    titles = [f"{training} training" for training in shares]
    canvas, panels = style.new_panels(titles, 0.4 + 0.2 * len(parts), edge=1.4)
    shades = colormaps["viridis"](np.linspace(0.05, 0.95, tasks))
    for axes, (own, values) in zip(panels.values(), shares.values(), strict=True):
        starts = np.cumsum(values, axis=1) - values
        for task in range(tasks):
            axes.barh(own, values[:, task], left=starts[:, task], color=shades[task], height=0.82)
        style.without_frame(axes)
        axes.tick_params(length=0, axis="y")
    axes.invert_yaxis()
    axes.set(xlabel="share of the merged parameters, %", xlim=(0, 100))
    by_task = cm.ScalarMappable(colors.Normalize(0.5, tasks + 0.5), colors.ListedColormap(shades))
    ticks = sorted({1, tasks, (tasks + 1) // 2})
    style.scale_on_top(canvas, by_task, "task that the parameter comes from", ticks=ticks)
    thirds = np.array_split(np.arange(tasks), min(3, tasks))
    heads = [f"tasks {t[0] + 1}-{t[-1] + 1}" if len(t) > 1 else f"task {t[0] + 1}" for t in thirds]
    return Drawing(
        canvas,
        f"Origins of the merged parameters on {setting.title}",
        "The task whose value the max-magnitude merge keeps, as a share of the parameters of each "
        "part of the network, from the input at the top to the output. Parameters that no task "
        f"changed are left out. {style.seeds_note(measured.seeds, band=False)}",
        ("training", "part", *heads),
        tuple(
            (training, part, *(style.number(values[i, third].sum()) for third in thirds))
            for training, (own, values) in shares.items()
            for i, part in enumerate(own)
        ),
    )


def parts_of(names: Iterable[str]) -> list[str]:
    """Name the part of the network that each parameter belongs to.

    That is its name up to the first number, as of a block, or without the last word, less the
    words that all names begin with, and those that say no more than that there is a network.

    Example:
        >>> parts_of(["visual.conv1.weight", "visual.trunk.blocks.0.mlp.bias", "visual.proj"])
        ['conv1', 'blocks.0', 'proj']
    """
    words = [name.split(".") for name in names]
    columns = zip(*(parts[:-1] for parts in words), strict=False)
    common = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    return [_part([w for w in parts[common:] if w not in _HULLS]) for parts in words]


_HULLS = ("trunk", "transformer", "encoder", "model", "module")
# Parts without a number that come before the blocks in the networks of open_clip and timm.
_FIRST = re.compile(r"conv_stem|conv\d?|stem|bn1|cls_token|.*embed.*|ln_pre|norm_pre")


def _part(words: list[str]) -> str:
    for index, word in enumerate(words):
        if word.isdigit() and index:
            return ".".join(words[: index + 1][-2:])
    return ".".join((words[:-1] or words)[-2:])


def _position(part: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Sort parts from the input to the output, as far as names tell; numbers by their value."""
    words = part.split(".")
    section = 0 if _FIRST.fullmatch(words[0]) else 1 if words[-1].isdigit() else 2
    return section, [(w.isdigit(), int(w) if w.isdigit() else 0, w) for w in words]


def _shares(every: Sequence[Measures]) -> tuple[list[str], Any]:
    """Parts, and per cent by part and task as the mean over seeds, float64 [parts, T]."""
    seeds = []
    for found in every:
        counts = np.array([numbers for _, numbers in found["parts"]], dtype=float)
        seeds.append(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    return [part for part, _ in every[0]["parts"]], np.mean(seeds, axis=0)
