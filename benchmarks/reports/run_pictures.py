"""The pictures of a single run, for its folder and its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.formatting import counted, data_label, rounded
from cl_merge.benchmarks.reports.figures.accuracy import draw_accuracies
from cl_merge.benchmarks.reports.figures.style import (
    WIDTH,
    Drawing,
    figure_style,
    heat_map,
    new_canvas,
    save_png,
    shortened,
    svg_element,
)
from cl_merge.benchmarks.reports.figures.suite_runs import in_table_order
from cl_merge.benchmarks.runs.results import finished_results

PICTURES = ("accuracy_by_task", "accuracy_matrix")
"""What the pictures in a run's folder are called."""


def draw_pictures(results: Mapping[str, Any], folder: Path) -> None:
    """Draw the pictures of a run, given its ``results.json``, as PNG files in its folder."""
    with figure_style():
        for drawing in _pictures(results, columns=2):
            save_png(drawing.canvas, folder / f"{drawing.kind}.png")


def pictures_of_run(folder: Path, setting: str) -> list[Drawing]:
    """Draw the pictures of a finished run for the setting that its report has."""
    with figure_style():
        return [
            replace(own, setting=setting, svg=svg_element(own.canvas, own.kind, own.title))
            for own in _pictures(finished_results(folder), columns=1)
        ]


def _pictures(results: Mapping[str, Any], columns: int) -> Iterator[Drawing]:
    methods = {name: [results["methods"][name]] for name in in_table_order(results["methods"])}
    tasks = len(results["tasks"])
    curve = draw_accuracies(methods, tasks, title_of_run(results), columns=columns, fewest=1)
    if curve is not None:
        yield replace(curve, kind=PICTURES[0])
    yield _draw_matrix(results)


def _draw_matrix(results: Mapping[str, Any]) -> Drawing:
    """The accuracy matrix of the run's method as a heat map, zero-shot as its first row."""
    method, tasks = results["method"], len(results["tasks"])
    matrix = results["methods"][method]["matrix"]
    rows = [results["methods"]["zero-shot"]["matrix"][0], *matrix]
    after = [f"task {i + 1}" for i in range(tasks)] if len(matrix) > 1 else ["all tasks"]
    numbered = tasks <= 20  # more cells are smaller, with room for no number
    high, wide = (0.5, 0.7) if numbered else (0.18, 0.25)
    canvas = new_canvas(2.2 + high * len(rows), max(WIDTH, 2.5 + wide * tasks))
    axes = canvas.add_subplot()
    image = heat_map(axes, [[float("nan") if v is None else v for v in row] for row in rows])
    names = [shortened(task["name"]) for task in results["tasks"]]
    axes.set_xticks(range(tasks), names, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), ["zero-shot", *after])
    axes.set(xlabel="accuracy on task", ylabel="after")
    axes.set_title(f"{method} on {_data(results)}: task-agnostic accuracy, %")
    for i, row in enumerate(rows if numbered else []):
        for j, value in enumerate(row):
            shade = "white" if value is not None and value < 60 else "black"
            said = "-" if value is None else rounded(value, 0)
            axes.text(j, i, said, ha="center", va="center", color=shade, fontsize=8)
    canvas.colorbar(image, ax=axes)
    numbers = [str(number + 1) for number in range(tasks)]
    return Drawing(
        canvas,
        f"Accuracy matrix of {method}",
        "Accuracy on each task (column) after each task (row), among all classes; the first row is "
        "zero-shot.",
        ("after task", *numbers),
        tuple((number, *row) for number, row in zip(numbers, matrix, strict=False)),
        kind=PICTURES[1],
    )


def title_of_run(results: Mapping[str, Any]) -> str:
    """Say what a run is of, such as ``cifar100 in 10 tasks``."""
    return f"{_data(results)} in {counted(len(results['tasks']), 'task')}"


def _data(results: Mapping[str, Any]) -> str:
    return shortened(data_label(results["data"]), 30)
