"""The accuracy matrices of all methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.benchmarks.reports.figures.figure import Drawn, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.seeds import number
from cl_merge.benchmarks.reports.figures.style import INK, new_canvas

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

_COLUMNS = 3
_MAP = "viridis"


def draw_matrix(measured: Sequence[Measured]) -> Drawn | None:
    """Draw the accuracy matrix of every method that was evaluated after every task.

    Args:
        measured: One setting; its results are all that counts.

    Returns:
        The figure; None if there is no such method.
    """
    setting = measured[0].setting
    matrices = _matrices(setting.methods(joint=False), setting.tasks)
    if not matrices:
        return None
    rows = -(-len(matrices) // _COLUMNS)
    canvas = new_canvas(1.2 + 1.6 * rows)
    grid = canvas.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    ticks = sorted({1, setting.tasks, (setting.tasks + 1) // 2})
    for axes in grid.flat[len(matrices) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid.flat, matrices.items(), strict=False):
        image = axes.imshow(
            values, vmin=0, vmax=100, cmap=_MAP, aspect="auto", interpolation="none"
        )
        axes.set_title(name.replace("-sequential", "\nsequential"), fontsize=9.5)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=2)
        axes.axhline(0.5, color=INK, linewidth=1.2)  # below the row before any training
        axes.set_yticks([0, *ticks], ["0", *map(str, ticks)])
        axes.set_xticks([tick - 1 for tick in ticks], list(map(str, ticks)))
    canvas.supxlabel("accuracy on task", fontsize=10)
    canvas.supylabel("after so many tasks; 0: zero-shot", fontsize=10)
    _colour_scale(canvas, image)
    seeds = max(len(results) for results in setting.methods(joint=False).values())
    return Drawn(
        canvas,
        f"Accuracy matrices on {setting.title}",
        "Accuracy on each task (column) after each task (row), among all classes of the data set; "
        "the first row is zero-shot. Right of the diagonal are tasks that are still to come. "
        + (f"Mean over {seeds} seeds." if seeds > 1 else "One seed."),
        _alt(matrices),
        _table(matrices),
    )


MATRIX = Kind("matrix", draw_matrix)

_Matrices = dict[str, "NDArray[np.float64]"]


def _matrices(methods: Mapping[str, Sequence[Mapping[str, Any]]], tasks: int) -> _Matrices:
    """By method, means over seeds, float64 [T + 1, T], zero-shot first."""
    means = {}
    for name, results in methods.items():
        whole = [np.array(result["matrix"], dtype=float) for result in results]
        # Seeds may have classes in other orders: a cell is a place in the stream, not a data set.
        whole = [matrix for matrix in whole if matrix.shape == (tasks, tasks)]
        if whole:
            means[name] = np.mean(whole, axis=0)
    zero_shot = means.pop("zero-shot", np.full((1, tasks), np.nan))[:1]
    return {name: np.concatenate([zero_shot, matrix]) for name, matrix in means.items()}


def _colour_scale(canvas: matplotlib.figure.Figure, image: AxesImage) -> None:
    bar = canvas.colorbar(
        image, ax=canvas.axes, orientation="horizontal", location="top", aspect=40, pad=0.02
    )
    bar.set_label("accuracy, %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def _alt(matrices: _Matrices) -> str:
    said = ", ".join(f"{name} {_mean(values[-1]):.1f} %" for name, values in matrices.items())
    return f"Heat maps of accuracy by task and time. Mean over tasks after the last: {said}."


def _table(matrices: _Matrices) -> Table:
    """What can be read off a matrix in three numbers."""
    rows = []
    for name, values in matrices.items():
        after = values[1:]
        new, old = np.diagonal(after), after[-1, :-1]
        coming = np.diagonal(after, offset=1)
        rows.append((name, *(number(_mean(part)) for part in (new, old, coming))))
    columns = ("method", "the task just learned", "earlier tasks at the end", "the next task")
    return Table(columns, tuple(rows))


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.mean(values)) if np.size(values) else float("nan")
