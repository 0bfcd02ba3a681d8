"""The pictures that a run leaves in its own folder, for its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_merge.benchmarks.reports.figures.figure import Figure, Table
from cl_merge.benchmarks.runs.results import finished_results


def pictures_of_run(folder: str | Path, setting: str) -> list[Figure]:
    """Find the pictures of a finished run.

    Args:
        folder: The run's.
        setting: Name of its setting, as in `summary_of_run`.

    Returns:
        Those of ``accuracy_by_task.png`` and ``accuracy_matrix.png`` that are there.

    Raises:
        InputError: If no run has finished there.
    """
    folder = Path(folder)
    results = finished_results(folder)
    made = [_curve(results, setting, folder), _matrix(results, setting, folder)]
    return [picture for picture in made if picture.file.is_file()]


def _curve(results: dict[str, Any], setting: str, folder: Path) -> Figure:
    steps = tuple(str(number + 1) for number in range(len(results["tasks"])))
    rows = tuple((name, *own["seen"]) for name, own in results["methods"].items())
    last = ", ".join(f"{name} {own['accuracy']:.1f} %" for name, own in results["methods"].items())
    return Figure(
        "Accuracy while learning",
        "curve",
        setting,
        folder / "accuracy_by_task.png",
        "Accuracy after each task on the test images of all tasks so far, among all classes.",
        f"Lines of accuracy against tasks learned. After the last: {last}.",
        Table(("method", *steps), rows),
    )


def _matrix(results: dict[str, Any], setting: str, folder: Path) -> Figure:
    method, matrix = results["method"], results["methods"][results["method"]]["matrix"]
    rows = tuple((str(number + 1), *row) for number, row in enumerate(matrix))
    return Figure(
        f"Accuracy matrix of {method}",
        "matrix",
        setting,
        folder / "accuracy_matrix.png",
        "Accuracy on each task (column) after each task (row), among all classes; the first row is "
        "zero-shot.",
        f"Heat map of the accuracy of {method} on each task after each task.",
        Table(("after task", *(str(number + 1) for number in range(len(rows[0]) - 1))), rows),
    )
