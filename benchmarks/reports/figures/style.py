"""How all figures look: sizes, one colour for each merger, one line style for each training.

Colours are of medium brightness, at least 3 : 1 against white and against a dark page, and told
apart with any of the common colour visions; markers say the same once more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.benchmarks.reports.figures.seeds import Line

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

WIDTH = 4.6
"""Inches: narrow, so that letters are still 8 pixels high where a page is 360 pixels wide."""

INK = "#21262b"
"""Letters and axes. In an SVG they take the colour of the text around the figure."""

GREY = "#7f7f7f"
"""Lines to compare with."""

_MAGMAX = "#a54a29"
COLOURS: dict[str, str] = {
    "magmax": _MAGMAX,
    "max-abs": _MAGMAX,  # the same rule
    "average": "#3a6ad7",
    "task-arithmetic": "#07a978",
    "random-mix": "#974d8c",
    "ties": "#ac9106",
}
"""By merger; others take one of `OTHERS`."""

UNMERGED: dict[str, str] = {
    "sequential": "#7a5fd0",
    "independent": "#2f97a8",
    "lwf": "#a0522d",
    "ewc": "#86902a",
}
"""By training, of what is not merged; never in one picture with mergers."""

STATISTICS: dict[str, str] = {"base": "#2f97a8", "aligned": "#8c6bd1", "both": "#d1458b"}
"""By kind, of class statistics beside whatever merger; in a panel of their own."""

OTHERS = ("#c2508c", "#4f8f3a", "#2f8fa3", "#8c6bd1", "#c0504d", "#7d7f9e")

_MARKERS = {"magmax": "o", "max-abs": "o", "average": "s", "task-arithmetic": "^"}
_MARKERS |= {"random-mix": "D", "ties": "v"}
_UNMERGED_MARKERS = {"sequential": "o", "independent": "s", "lwf": "^", "ewc": "D", "joint": "*"}

Dashes = str | tuple[int, tuple[float, ...]]
DASHES: dict[str | None, Dashes] = {
    None: (0, (1, 1.5)),
    "sequential": "-",
    "independent": (0, (5, 2)),
    "lwf": (0, (6, 1.5, 1.5, 1.5)),
    "ewc": (0, (2, 1.2)),
    "joint": "-",
}
"""By training."""


@contextmanager
def figure_style() -> Iterator[None]:
    """Make and save figures in the same style, whatever the user's settings of matplotlib.

    Yields:
        Nothing; the former settings are back when the block ends.
    """
    import matplotlib as mpl

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.labelsize": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "cl_merge",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield


def new_canvas(height: float, width: float = WIDTH) -> matplotlib.figure.Figure:
    """Make an empty picture.

    Args:
        height: In inches.
        width: In inches.

    Returns:
        A figure of matplotlib, made without pyplot: no window system is needed and no global state
        is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def colour_of(merger: str) -> str:
    """The colour of a merger, the same in every figure.

    Args:
        merger: Its name.

    Returns:
        As ``#rrggbb``.
    """
    return COLOURS.get(merger) or OTHERS[zlib.crc32(merger.encode()) % len(OTHERS)]


def look_of(
    merger: str | None, training: str | None, statistics: str | None = None
) -> dict[str, Any]:
    """How the line of a method looks.

    Args:
        merger: The merger; None for what is not merged.
        training: The training; None for zero-shot.
        statistics: The kind of its class statistics; None for the text head alone.

    Returns:
        Arguments for ``Axes.plot``: colour, line style, marker.
    """
    own = training or ""
    marker = _MARKERS.get(merger, "P") if merger else _UNMERGED_MARKERS.get(own)
    colour = colour_of(merger) if merger else UNMERGED.get(own, GREY)
    if statistics is not None:
        marker = marker if merger else "X"
        colour = STATISTICS.get(statistics, GREY)
    look = {"color": colour, "linestyle": DASHES.get(training, "-")}
    return look | ({"marker": marker, "markeredgewidth": 0} if marker else {})


def draw_line(
    axes: Axes, x: Sequence[float], line: Line, label: str, look: Mapping[str, Any]
) -> None:
    """Draw a line with the band of its spread.

    Args:
        axes: Where.
        x: Positions.
        line: Means and spreads.
        label: For the legend.
        look: Arguments for ``Axes.plot``.
    """
    axes.plot(x, line.means, label=label, **look)
    if line.seeds > 1 and np.isfinite(line.spreads).any():
        axes.fill_between(x, line.lower, line.upper, color=look["color"], alpha=0.18, linewidth=0)


def whole_steps(axes: Axes) -> None:
    """Put the ticks of the x axis at whole numbers only.

    Args:
        axes: Whose.
    """
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it covers nothing.

    Args:
        axes: With labelled lines.
    """
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0, labelspacing=0.45)


def legend_below(canvas: matplotlib.figure.Figure, axes: Axes, columns: int = 2) -> None:
    """Put the legend under the picture.

    Args:
        canvas: The picture.
        axes: With labelled lines.
        columns: Of the legend.
    """
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)
