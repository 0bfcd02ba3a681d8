"""How all figures look and how they are saved.

Colours are of medium brightness, at least 3 : 1 against white and against a dark page, and told
apart with any of the common colour visions; markers say the same once more.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.mergers import MERGERS
from cl_merge.storage.files import atomic_write

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

WIDTH = 4.6
"""Inches: narrow, so that letters are still 8 pixels high where a page is 360 pixels wide."""

INK = "#21262b"
"""Letters and axes. In an SVG they take the colour of the text around the figure."""

GREY = "#7f7f7f"
"""Lines to compare with."""

PALETTE = (
    *("#a54a29", "#3a6ad7", "#07a978", "#974d8c", "#ac9106"),  # mergers of the tables
    *("#2f97a8", "#d1458b", "#7a5fd0", "#86902a", "#7d7f9e", "#9c24fc"),  # all else
)
_MARKERS = "os^DvPXph*<"
# In pictures of what is merged, in those of what is not, and in those of class statistics.
# On independent fine-tunings the rule of MagMax has a name of its own.
_MERGERS = {
    "magmax": 0,
    "max-abs": 0,
    "average": 1,
    "task-arithmetic": 2,
    "random-mix": 3,
    "ties": 4,
}
_TRAININGS = {
    "drift-penalty": 10,
    "independent": 5,
    "lwf": 6,
    "sequential": 7,
    "ewc": 8,
    "joint": 9,
}
_STATISTICS = {"base": 5, "both": 6, "aligned": 7}

DASHED = (0, (5, 2))
DOTTED = (0, (1, 1.5))
_DASHES: dict[str | None, Any] = {
    None: DOTTED,
    "independent": DASHED,
    "lwf": (0, (6, 1.5, 1.5, 1.5)),
    "ewc": (0, (2, 1.2)),
    "drift-penalty": (0, (8, 2)),
}


@dataclass(frozen=True)
class Drawing:
    """A figure with what it says in words and numbers; it equals another that says the same."""

    canvas: matplotlib.figure.Figure = field(compare=False, repr=False)
    title: str
    caption: str  # what is drawn and how it was measured
    # Its numbers as a table, which says the same to those who cannot see it.
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    kind: str = ""
    setting: str = ""  # its name; that of the data set where the figure compares its settings
    svg: str = field(default="", repr=False)  # an element for the inside of a page


@contextmanager
def figure_style() -> Iterator[None]:
    """Make figures in the same style, whatever the user's settings of matplotlib."""
    from matplotlib import style as mpl_style

    with mpl_style.context(Path(__file__).with_name("report.mplstyle"), after_reset=True):
        yield


def new_canvas(height: float, width: float = WIDTH) -> matplotlib.figure.Figure:
    """Make an empty picture of a size in inches, without pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_drawing(canvas: matplotlib.figure.Figure, file: Path, title: str) -> str:
    """Write a picture as SVG, and as PNG on white beside it; returns the SVG."""
    svg = svg_element(canvas, file.stem, title)
    with atomic_write(file) as temporary:
        temporary.write_text(svg, encoding="utf-8")
    save_png(canvas, file.with_suffix(".png"))
    return svg


def svg_element(canvas: matplotlib.figure.Figure, name: str, title: str) -> str:
    """Write a picture as an ``<svg>`` element for a page or a file, the same bytes each time.

    Its ids depend on its name, and letters and axes have the colour of the text around it.
    """
    import matplotlib as mpl

    written = BytesIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        canvas.savefig(written, format="svg", metadata=no_metadata)
    svg = written.getvalue().decode()
    # Groups are numbered alike in every picture, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]+"', "<g", svg[svg.index("<svg") :]).replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def save_png(canvas: matplotlib.figure.Figure, file: Path) -> None:
    """Write a picture as PNG on white."""
    with atomic_write(file) as temporary:
        canvas.savefig(
            temporary, format="png", dpi=200, facecolor="white", metadata={"Software": None}
        )


def look_of(
    merger: str | None, training: str | None, statistics: str | None = None
) -> dict[str, Any]:
    """How the line of a method looks, as arguments for ``Axes.plot``.

    A merger has one colour in every figure, whichever training it merges; class statistics have
    their own beside whatever merger. The training decides the dashes.
    """
    dashes = {"linestyle": _DASHES.get(training, "-")}
    if statistics is not None:
        index = _STATISTICS.get(statistics, len(PALETTE) - 1)
    elif merger in _MERGERS:
        index = _MERGERS[merger]
    elif merger is not None:
        # Several have one of the colours that are left, each with a marker of its own.
        others = [name for name in MERGERS if name not in _MERGERS]
        number = others.index(merger) if merger in others else zlib.crc32(merger.encode())
        rest = PALETTE[len({*_MERGERS.values()}) :]
        turn, colour = divmod(number, len(rest))
        marker = _MARKERS[(number + turn) % len(_MARKERS)]
        return {"color": rest[colour], "marker": marker, **dashes}
    elif training is not None:
        index = _TRAININGS[training]
    else:
        return {"color": GREY, **dashes}
    return {"color": PALETTE[index], "marker": _MARKERS[index], **dashes}


@dataclass(frozen=True)
class Line:
    """A line over seeds: mean and sample standard deviation at each point, NaN where unknown."""

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


def over_seeds(values: Sequence[Sequence[float | None]]) -> Line:
    """Average lines over seeds, point by point; None where a seed has no value.

    Example:
        >>> over_seeds([[1.0, 2.0], [3.0, None]]).mean.tolist()
        [2.0, 2.0]
    """
    points = np.ma.masked_invalid(np.array(values, dtype=float))
    spread = np.ma.std(points, axis=0, ddof=1)
    return Line(points.mean(axis=0).filled(np.nan), spread.filled(np.nan))


def number(value: float, digits: int = 1) -> float | None:
    """Round a number for a table; None if it is not finite."""
    return round(float(value), digits) if math.isfinite(value) else None


def rows_of_lines(
    names: Sequence[str | float], lines: Iterable[Line], digits: int = 1
) -> tuple[tuple[str | float | None, ...], ...]:
    """A table with a row for each point of some lines, and a column for each line."""
    points = zip(*(line.mean for line in lines), strict=True)
    return tuple(
        (name, *(number(value, digits) for value in values))
        for name, values in zip(names, points, strict=True)
    )


def seeds_note(seeds: int, band: bool = True) -> str:
    """Say in a caption what is shown of several seeds."""
    if seeds < 2:
        return "One seed."
    end = "; the band is one standard deviation to each side." if band else "."
    return f"Mean over {seeds} seeds{end}"


def draw_line(axes: Axes, x: Sequence[float], line: Line, label: str, **look: Any) -> None:
    """Draw a line with the band of its spread."""
    axes.plot(x, line.mean, label=label, **look)
    if np.isfinite(line.spread).any():
        low, high = line.mean - line.spread, line.mean + line.spread
        axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


def new_panels(
    titles: Iterable[str],
    height: float,
    *,
    edge: float,
    columns: int = 1,
    width: float = WIDTH,
    lines: int = 0,
) -> tuple[matplotlib.figure.Figure, dict[str, Axes]]:
    """Make a picture of panels with the same axes; the panels by their titles.

    A row is `height` inches high, or higher for so many `lines` with words beside them; all around
    the panels takes `edge` inches more.
    """
    names, height = list(titles), max(height, 0.2 * lines)
    rows = math.ceil(len(names) / columns)
    canvas = new_canvas(edge + height * rows, width)
    grid = list(canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes, title in zip(grid, names, strict=False):
        axes.set_title(title)
    for axes in grid[max(len(names) - columns, 0) : len(names)]:
        axes.tick_params(labelbottom=True)  # with nothing below it
    return canvas, dict(zip(names, grid, strict=False))


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it covers nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0, labelspacing=0.45)


def legend_below(canvas: matplotlib.figure.Figure, columns: int = 2) -> None:
    """Put the legend of a picture's first axes under it."""
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)


def scale_on_top(canvas: matplotlib.figure.Figure, shown: Any, label: str, **more: Any) -> None:
    """Put the scale of colours over the picture, for an image or another mappable."""
    bar = canvas.colorbar(shown, ax=canvas.axes, location="top", aspect=40, pad=0.02, **more)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def without_frame(axes: Axes) -> None:
    """Leave out the lines around axes and across them."""
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)


def heat_map(axes: Axes, values: Any) -> AxesImage:
    """Draw accuracies in per cent as a matrix of colours."""
    without_frame(axes)
    return axes.imshow(
        values, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="none"
    )


def label_ends(
    axes: Axes, ends: Sequence[tuple[str, float, float, str]], bold: str = "", size: float = 9
) -> None:
    """Write at the right of the axes what each line is, without overlaps.

    Each end is a label, x, y and a colour; the limits of the axes must be settled.
    """
    from scipy.optimize import isotonic_regression

    canvas: Any = axes.get_figure()
    canvas.draw_without_rendering()  # settles how high the axes are
    low, high = axes.get_ylim()
    gap = 1.25 * size / 72 * canvas.dpi / axes.bbox.height * (high - low)
    ends = sorted(ends, key=lambda end: end[2])
    # As near to the ends as labels a gap apart can be; the topmost does not leave the axes.
    below = gap * np.arange(len(ends))
    nearest = isotonic_regression([y for _, _, y, _ in ends] - below).x
    heights = np.minimum(nearest, high - below[-1:]) + below
    for (label, x, y, colour), at in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (x, y),
            (1.04, at),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            fontsize=size,
            fontweight="bold" if label == bold else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def shortened(text: str, limit: int = 16) -> str:
    """Cut a text to so many characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
