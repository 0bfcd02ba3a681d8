"""Which tasks the parameters of the max-magnitude merge come from, by part of the network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.analysis import origin_counts
from cl_merge.benchmarks.reports.figures.figure import Drawn, Found, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.runs import SuiteRun
from cl_merge.benchmarks.reports.figures.seeds import number
from cl_merge.benchmarks.reports.figures.style import new_canvas
from cl_merge.benchmarks.reports.figures.trainings import PLAIN, TITLES

if TYPE_CHECKING:
    import matplotlib.figure
    from numpy.typing import NDArray

_MAP = "viridis"


def measure_origins(run: SuiteRun, _: Callable[[], Any]) -> Found:
    """Count where the merged parameters come from.

    Args:
        run: The run.

    Returns:
        ``parts``: by part of the network, in its order, the number of entries of each task.
    """
    counts = origin_counts(run.vectors())
    parts: dict[str, list[int]] = {}
    for part, name in zip(parts_of(counts), counts, strict=True):
        former = parts.get(part, [0] * run.tasks)
        parts[part] = [a + b for a, b in zip(former, counts[name], strict=True)]
    # Pairs, for the order: files of task vectors are sorted by name.
    return {"parts": [[part, parts[part]] for part in sorted(parts, key=_position)]}


def draw_origins(measured: Sequence[Measured]) -> Drawn | None:
    """Draw a bar for every part of the network, cut by task.

    Args:
        measured: One setting.

    Returns:
        The figure; None if nothing was measured.
    """
    import matplotlib as mpl

    setting = measured[0].setting
    shares = measured[0].by_training(_shares)
    if not shares:
        return None
    names = next(iter(shares.values()))[0]
    canvas = new_canvas(1.4 + len(shares) * (0.4 + 0.2 * len(names)))
    all_axes = canvas.subplots(len(shares), sharex=True, squeeze=False)[:, 0]
    colours = mpl.colormaps[_MAP](np.linspace(0.05, 0.95, setting.tasks))
    for axes, (training, (parts, values)) in zip(all_axes, shares.items(), strict=True):
        starts = np.cumsum(values, axis=1) - values
        for task in range(setting.tasks):
            axes.barh(
                parts, values[:, task], left=starts[:, task], color=colours[task], height=0.82
            )
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=2, axis="x")
        axes.tick_params(length=0, axis="y")
        axes.set_xlim(0, 100)
        axes.set_title(TITLES[training])
    all_axes[-1].set_xlabel("share of the merged parameters, %")
    _task_scale(canvas, setting.tasks)
    seeds = max(len(measured[0].over_seeds(training)) for training in shares)
    return Drawn(
        canvas,
        f"Origins of the merged parameters on {setting.title}",
        "The task whose value the max-magnitude merge keeps, as a share of the parameters of each "
        "part of the network, from the input at the top to the output. Parameters that no task "
        "changed are left out. " + (f"Mean over {seeds} seeds." if seeds > 1 else "One seed."),
        _alt(shares, setting.tasks),
        _table(shares, setting.tasks),
    )


ORIGINS = Kind("origins", draw_origins, measure_origins, trainings=PLAIN)


def parts_of(names: Iterable[str]) -> list[str]:
    """Name the part of the network that each parameter belongs to.

    That is its name up to the first number, as of a block, or without the last word, less the
    words that all names begin with, and those that say no more than that there is a network.

    Args:
        names: Of all parameters.

    Returns:
        A part for each.

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
    for place, word in enumerate(words):
        if word.isdigit() and place:
            return ".".join(words[: place + 1][-2:])
    return ".".join((words[:-1] or words)[-2:])


def _position(part: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Sort parts from the input to the output, as far as names tell; numbers by their value."""
    words = part.split(".")
    place = 0 if _FIRST.fullmatch(words[0]) else 1 if words[-1].isdigit() else 2
    return place, [(w.isdigit(), int(w) if w.isdigit() else 0, w) for w in words]


def _shares(all_found: Sequence[Found]) -> tuple[list[str], NDArray[np.float64]]:
    """Parts, and per cent by part and task as the mean over seeds, float64 [parts, T]."""
    names = [part for part, _ in all_found[0]["parts"]]
    seeds = []
    for found in all_found:
        counts = np.array([numbers for _, numbers in found["parts"]], dtype=float)
        seeds.append(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    return names, np.mean(seeds, axis=0)


def _task_scale(canvas: matplotlib.figure.Figure, tasks: int) -> None:
    import matplotlib as mpl

    bounds = mpl.colors.Normalize(0.5, tasks + 0.5)
    colours = mpl.colormaps[_MAP](np.linspace(0.05, 0.95, tasks))
    map_ = mpl.colors.ListedColormap(colours)
    bar = canvas.colorbar(
        mpl.cm.ScalarMappable(bounds, map_),
        ax=canvas.axes,
        location="top",
        aspect=40,
        pad=0.02,
        ticks=sorted({1, tasks, (tasks + 1) // 2}),
    )
    bar.set_label("task that the parameter comes from")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def _alt(shares: Mapping[str, tuple[list[str], NDArray[np.float64]]], tasks: int) -> str:
    said = []
    for training, (_, values) in shares.items():
        mean = values.mean(axis=0)
        said.append(
            f"{training} training: on average over the parts {mean[0]:.0f} % from the first task "
            f"and {mean[-1]:.0f} % from the last of {tasks}"
        )
    return f"Stacked bars by part of the network. {'; '.join(said)}."


def _table(shares: Mapping[str, tuple[list[str], NDArray[np.float64]]], tasks: int) -> Table:
    thirds = np.array_split(np.arange(tasks), min(3, tasks))
    heads = [f"tasks {t[0] + 1}-{t[-1] + 1}" if len(t) > 1 else f"task {t[0] + 1}" for t in thirds]
    rows = [
        (training, part, *(number(float(values[i, third].sum())) for third in thirds))
        for training, (parts, values) in shares.items()
        for i, part in enumerate(parts)
    ]
    return Table(("training", "part", *heads), tuple(rows))
