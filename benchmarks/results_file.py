"""Reading ``results.json``: whole and right in every part that anybody uses, or an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.json_checks import (
    ACCURACY,
    AMOUNT,
    COUNT,
    FIGURE,
    NAME,
    PER_CENT,
    SCALE,
    TEXT,
    entries,
    list_of,
    mapping_of,
    of,
)
from cl_merge.benchmarks.json_files import read_json
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
    if results is None:
        return None
    for wrong in chain(_RESULTS(results), _sizes(results)):
        raise InputError(
            f"'{file}' is damaged: {wrong.lstrip('.')}; restore it, or run again in a new folder"
        )
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
        "accuracy": ACCURACY,
        "metrics": mapping_of(FIGURE),
        "matrix": list_of(list_of(PER_CENT)),
        "matrix_task_aware": list_of(list_of(PER_CENT)),
        "seen": list_of(PER_CENT),
        "training": NAME,
        "merger": NAME,
        "scale": SCALE,
    },
    {"statistics": NAME, "chosen_scales": list_of(SCALE)},
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
    {"finished": TEXT, "versions": mapping_of(TEXT), "machine": mapping_of(of("", lambda _: True))},
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
