"""The pictures of a single run: those in its folder, and the one of the README.

``python -m cl_merge.benchmarks.reports.run_pictures RUN docs/_static`` draws the latter anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.formatting import counted, data_label, rounded
from cl_merge.benchmarks.reports.figures.accuracy import draw_accuracies
from cl_merge.benchmarks.reports.figures.figure import Drawing
from cl_merge.benchmarks.reports.figures.style import (
    INK,
    figure_style,
    heat_map,
    label_ends,
    new_canvas,
    save_png,
    shortened,
    svg_element,
)
from cl_merge.benchmarks.reports.figures.suite_runs import in_table_order
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("accuracy_by_task", "accuracy_matrix")
"""What the pictures in a run's folder are called."""


def draw_pictures(results: Mapping[str, Any], folder: Path) -> None:
    """Draw the pictures of a run as PNG files in its folder.

    Args:
        results: The content of ``results.json``.
        folder: Where they go.
    """
    with figure_style():
        for drawing in _pictures(results, columns=2):
            save_png(drawing.canvas, folder / f"{drawing.kind}.png")


def pictures_of_run(folder: Path, setting: str) -> list[Drawing]:
    """Draw the pictures of a finished run for its report.

    Args:
        folder: The run's.
        setting: The name of its setting in the report.
    """
    with figure_style():
        return [
            replace(own, setting=setting, svg=svg_element(own.canvas, own.kind, own.title))
            for own in _pictures(finished_results(folder), columns=1)
        ]


def _pictures(results: Mapping[str, Any], columns: int) -> Iterator[Drawing]:
    methods = {name: [results["methods"][name]] for name in in_table_order(results["methods"])}
    tasks = len(results["tasks"])
    curve = draw_accuracies(methods, tasks, _title(results), columns=columns, fewest=1)
    if curve is not None:
        yield replace(curve, kind=PICTURES[0])
    yield replace(_draw_matrix(results), kind=PICTURES[1])


def _draw_matrix(results: Mapping[str, Any]) -> Drawing:
    """The accuracy matrix of the run's method as a heat map, zero-shot as its first row."""
    method, tasks = results["method"], len(results["tasks"])
    matrix = results["methods"][method]["matrix"]
    rows = [results["methods"]["zero-shot"]["matrix"][0], *matrix]
    after = [f"task {i + 1}" for i in range(tasks)] if len(matrix) > 1 else ["all tasks"]
    canvas = new_canvas(2.2 + 0.5 * len(rows), 2.5 + 0.7 * tasks)
    axes = canvas.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in rows]
    image = heat_map(axes, values)
    names = [shortened(task["name"]) for task in results["tasks"]]
    axes.set_xticks(range(tasks), names, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), ["zero-shot", *after])
    axes.set_xlabel("accuracy on task")
    axes.set_ylabel("after")
    axes.set_title(f"{method} on {_data(results)}: task-agnostic accuracy, %")
    for i, row in enumerate(rows if tasks <= 20 else []):
        for j, value in enumerate(row):
            shade = "white" if value is not None and value < 60 else "black"
            said = "-" if value is None else rounded(value, 0)
            axes.text(j, i, said, ha="center", va="center", color=shade, fontsize=8)
    canvas.colorbar(image, ax=axes)
    return Drawing(
        canvas,
        f"Accuracy matrix of {method}",
        "Accuracy on each task (column) after each task (row), among all classes; the first row is "
        "zero-shot.",
        ("after task", *(str(number + 1) for number in range(tasks))),
        tuple((str(number + 1), *row) for number, row in enumerate(matrix)),
    )


# Of the README's picture: letters and axes, the run's method, and the other mergers.
_THEMES = {
    "light": {"ink": INK, "accent": "#a54a29", "quiet": "#6b737b"},
    "dark": {"ink": "#e6e8ea", "accent": "#f08a63", "quiet": "#9aa2aa"},
}


def draw_result(results: Mapping[str, Any], theme: str) -> tuple[Figure, str]:
    """Draw what merging gives: the run's method against fine-tuning on one task after another.

    Args:
        results: The content of ``results.json`` of a run with `sequential` among its methods.
        theme: ``"light"`` or ``"dark"``, the background that it will stand on.

    Returns:
        The picture, and what it shows in words.
    """
    from matplotlib.ticker import MaxNLocator

    colours, methods = _THEMES[theme], results["methods"]
    tasks, own = len(results["tasks"]), results["method"]
    others = [
        name
        for name, result in methods.items()
        if result["merger"] and not result.get("statistics") and name != own
    ]
    with figure_style(colours["ink"]):
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
            ("sequential", "sequential fine-tuning", colours["ink"], {"lw": 2.2, "marker": "o"}),
            (own, own, colours["accent"], {"lw": 3.2, "marker": "o", "markersize": 6}),
        ]
        for name, label, colour, look in lines:
            axes.plot(steps, methods[name]["seen"], color=colour, **look)
            value = methods[name]["seen"][-1]
            ends.append((f"{label}  {rounded(value)} %", tasks, value, colour))
        axes.set_title(f"{_title(results)}: accuracy on everything seen so far, %")
        axes.set_xlabel("tasks learned")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_ends(axes, ends, bold=ends[-1][0], size=10.5)
    said = ", ".join(label for label, *_ in ends if "%" in label)
    return canvas, f"Accuracy on everything seen, after the last task: {said}"


def _title(results: Mapping[str, Any]) -> str:
    return f"{_data(results)} in {counted(len(results['tasks']), 'task')}"


def _data(results: Mapping[str, Any]) -> str:
    return shortened(data_label(results["data"]), 30)


def main(run: str, folder: str) -> None:
    """Draw the picture of the README from a finished run, ``accuracy_light.svg`` and ``_dark``."""
    results = finished_results(Path(run))
    for theme in _THEMES:
        canvas, alt = draw_result(results, theme)
        with figure_style(_THEMES[theme]["ink"]):
            svg = svg_element(canvas, theme, alt, ink=_THEMES[theme]["ink"])
        with atomic_write(Path(folder) / f"accuracy_{theme}.svg") as temporary:
            temporary.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
