"""The pictures that a run leaves in its own folder, for its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_merge.errors import InputError


@dataclass(frozen=True)
class Table:
    """The numbers of a picture.

    Attributes:
        columns: The heads.
        rows: Texts and numbers; None where there is none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A picture on disk.

    Attributes:
        title: One line.
        setting: Name of the setting.
        file: The PNG.
        caption: What is drawn.
        alt: What it shows, for those who cannot see it.
        data: Its numbers.
    """

    title: str
    setting: str
    file: Path
    caption: str
    alt: str
    data: Table


def pictures_of_run(folder: str | Path, setting: str) -> list[Picture]:
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
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"'{folder}' holds no finished run ({error})") from error
    made = [_curve(results, setting, folder), _matrix(results, setting, folder)]
    return [picture for picture in made if picture.file.is_file()]


def _curve(results: dict[str, Any], setting: str, folder: Path) -> Picture:
    steps = tuple(str(number + 1) for number in range(len(results["tasks"])))
    rows = tuple((name, *own["seen"]) for name, own in results["methods"].items())
    last = ", ".join(f"{name} {own['accuracy']:.1f} %" for name, own in results["methods"].items())
    return Picture(
        "Accuracy while learning",
        setting,
        folder / "accuracy_by_task.png",
        "Accuracy after each task on the test images of all tasks so far, among all classes.",
        f"Lines of accuracy against tasks learned. After the last: {last}.",
        Table(("method", *steps), rows),
    )


def _matrix(results: dict[str, Any], setting: str, folder: Path) -> Picture:
    method, matrix = results["method"], results["methods"][results["method"]]["matrix"]
    rows = tuple((str(number + 1), *row) for number, row in enumerate(matrix))
    return Picture(
        f"Accuracy matrix of {method}",
        setting,
        folder / "accuracy_matrix.png",
        "Accuracy on each task (column) after each task (row), among all classes; the first row is "
        "zero-shot.",
        f"Heat map of the accuracy of {method} on each task after each task.",
        Table(("after task", *(str(number + 1) for number in range(len(rows[0]) - 1))), rows),
    )
