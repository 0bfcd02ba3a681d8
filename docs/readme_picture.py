"""Draws the picture of the README anew: ``python docs/readme_picture.py RUN docs/_static``.

The run must have had `sequential` among its methods.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.reports.figures.style import (
    INK,
    figure_style,
    label_ends,
    new_canvas,
    svg_element,
)
from cl_merge.benchmarks.reports.run_pictures import title_of_run
from cl_merge.benchmarks.runs.results import finished_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Letters and axes, the run's method, and the other mergers.
_THEMES = {
    "light": {"ink": "#21262b", "accent": "#a54a29", "quiet": "#6b737b"},
    "dark": {"ink": "#e6e8ea", "accent": "#f08a63", "quiet": "#9aa2aa"},
}


def draw_result(results: Mapping[str, Any], theme: str) -> tuple[Figure, str]:
    """Draw a run's method against sequential fine-tuning, and say the same in words."""
    from matplotlib.ticker import MaxNLocator

    colours, methods = _THEMES[theme], results["methods"]
    tasks, own = len(results["tasks"]), results["method"]
    others = [
        name
        for name, result in methods.items()
        if result["merger"] and not result.get("statistics") and name != own
    ]
    with figure_style():
        canvas = new_canvas(3.4, 7.2)
        axes = canvas.add_subplot()
        steps, ends = range(1, tasks + 1), []
        for name in others:
            axes.plot(steps, methods[name]["seen"], color=colours["quiet"], lw=0.9, alpha=0.7)
        if others:
            last = sorted(methods[name]["seen"][-1] for name in others)
            ends.append(("other mergers", tasks, last[len(last) // 2], colours["quiet"]))
        lines: list[tuple[str, str, str, dict[str, Any]]] = [
            ("zero-shot", "zero-shot", colours["quiet"], {"linestyle": ":", "lw": 1.6}),
            ("sequential", "sequential fine-tuning", INK, {"lw": 2.2, "marker": "o"}),
            (own, own, colours["accent"], {"lw": 3.2, "marker": "o", "markersize": 6}),
        ]
        for name, label, colour, look in lines:
            axes.plot(steps, methods[name]["seen"], color=colour, **look)
            value = methods[name]["seen"][-1]
            ends.append((f"{label}  {rounded(value)} %", tasks, value, colour))
        axes.set_title(f"{title_of_run(results)}: accuracy on everything seen so far, %")
        axes.set_xlabel("tasks learned")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_ends(axes, ends, bold=ends[-1][0], size=10.5)
    said = ", ".join(label for label, *_ in ends if "%" in label)
    return canvas, f"Accuracy on everything seen, after the last task: {said}"


def main(run: str, folder: str) -> None:
    """Write ``accuracy_light.svg`` and ``accuracy_dark.svg`` from a finished run."""
    results = finished_results(Path(run))
    for theme in _THEMES:
        canvas, alt = draw_result(results, theme)
        with figure_style():
            svg = svg_element(canvas, theme, alt)
        # It stands alone, with no text around it.
        svg = svg.replace("currentColor", _THEMES[theme]["ink"])
        (Path(folder) / f"accuracy_{theme}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
