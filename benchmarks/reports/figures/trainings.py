"""The two plain trainings as lines of one figure."""

from __future__ import annotations

from typing import Any

from cl_merge.benchmarks.reports.figures.style import COLOURS, DASHES

PLAIN = ("sequential", "independent")
"""What the paper compares, in the order of legends."""

TITLES = {name: f"{name} training" for name in PLAIN}
"""Over a picture of one."""


def look_of_training(training: str) -> dict[str, Any]:
    """How the line of a training looks where nothing is merged.

    Args:
        training: Its name.

    Returns:
        Arguments for ``Axes.plot``.
    """
    # The colours of the mergers that each is usually merged with.
    merger = "magmax" if training == "sequential" else "average"
    marker = "o" if training == "sequential" else "s"
    look = {"color": COLOURS[merger], "linestyle": DASHES[training], "marker": marker}
    return look | {"markeredgewidth": 0}
