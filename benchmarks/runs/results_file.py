"""Reading ``results.json``: whole and right in every part that anybody uses, or an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.runs.json_checks import (
    AMOUNT,
    COUNT,
    FIGURE_OR_NULL,
    PER_CENT,
    PER_CENT_OR_NULL,
    SCALE,
    TEXT,
    TEXT_OR_NULL,
    entries,
    first,
    list_of,
    mapping_of,
)
from cl_merge.benchmarks.runs.json_files import parse_json, read_json
from cl_merge.errors import InputError


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read what a finished run found.

    Args:
        folder: Of the run.

    Returns:
        The content of ``results.json``; None if no run has finished there.

    Raises:
        InputError: If the file cannot be read or is damaged; names the entry.
    """
    file = folder / "results.json"
    results = read_json(file)
    return None if results is None else _checked(results, file)


def finished_results(folder: Path) -> dict[str, Any]:
    """Read what a run found that must have finished.

    Args:
        folder: Of the run.

    Returns:
        The content of ``results.json``.

    Raises:
        InputError: If no run has finished there, or as of `read_results`.
    """
    results = read_results(folder)
    if results is None:
        raise InputError(f"'{folder}' holds no finished run: it has no results.json")
    return results


def parse_results(content: bytes, file: Path) -> dict[str, Any]:
    """Make the results of a run of what their file holds.

    Args:
        content: What it holds.
        file: Its place, for the error.

    Returns:
        The results.

    Raises:
        InputError: If they are damaged; names the entry.
    """
    return _checked(parse_json(content, file), file)


def _checked(results: dict[str, Any], file: Path) -> dict[str, Any]:
    # Sizes are looked at once all entries are known to be right by themselves.
    wrong = first(_RESULTS(results)) or first(_sizes(results))
    if wrong is not None:
        raise InputError(f"'{file}' is damaged: {wrong}; restore it, or run again in a new folder")
    return results


_TASK = entries(
    {
        "name": TEXT,
        "classes": list_of(COUNT),
        "class_names": list_of(TEXT),
        "train_images": COUNT,
        "test_images": COUNT,
    },
    {"held_out_images": COUNT},
)
_METHOD = entries(
    {
        "accuracy": PER_CENT,
        "metrics": mapping_of(FIGURE_OR_NULL),
        "matrix": list_of(list_of(PER_CENT_OR_NULL)),
        "matrix_task_aware": list_of(list_of(PER_CENT_OR_NULL)),
        "seen": list_of(PER_CENT_OR_NULL),
        "training": TEXT_OR_NULL,
        "merger": TEXT_OR_NULL,
        "scale": SCALE,
    },
    {"statistics": TEXT_OR_NULL, "chosen_scales": list_of(SCALE)},
)
_COST = entries({"seconds": AMOUNT, "peak_memory": COUNT, "peak_device_memory": COUNT})
_RESULTS = entries(
    {
        "method": TEXT,
        "seed": COUNT,
        "data": TEXT,
        "model": TEXT,
        "scenario": TEXT,
        "tasks": list_of(_TASK),
        "methods": mapping_of(_METHOD),
        "training": mapping_of(list_of(_COST)),
        "total": _COST,
    },
    {"finished": TEXT, "versions": mapping_of(TEXT), "machine": entries({})},
)


def _sizes(results: Mapping[str, Any]) -> Iterator[str]:
    """What does not fit together, of results whose entries are right by themselves."""
    tasks, methods = len(results["tasks"]), results["methods"]
    for name in (results["method"], "zero-shot"):
        if name not in methods:
            yield f"methods.{name} is missing"
    for place, task in enumerate(results["tasks"]):
        classes, names = len(task["classes"]), len(task["class_names"])
        if classes != names:
            yield f"tasks[{place}] has {classes} classes and {names} class_names"
    for name, found in methods.items():
        for key in ("matrix", "matrix_task_aware"):
            rows = found[key]
            if len(rows) > tasks or any(len(row) != tasks for row in rows):
                yield f"methods.{name}.{key} is not of {tasks} tasks"
        if len(found["seen"]) != tasks:
            yield f"methods.{name}.seen is not of {tasks} tasks"
