"""Reading ``results.json``: whole and right in every part that anybody uses, or an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.json_files import read_json
from cl_merge.errors import InputError

NAME = "results.json"

# A check yields what is wrong with a value, behind the way there.
_Check = Callable[[Any], Iterator[str]]


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read what a finished run found.

    Args:
        folder: Of the run.

    Returns:
        The content of ``results.json``; None if no run has finished there.

    Raises:
        InputError: If the file cannot be read or is damaged; names the entry.
    """
    file = folder / NAME
    results = read_json(file)
    if results is None:
        return None
    for wrong in chain(_RESULTS(results), _sizes(results)):
        raise InputError(
            f"'{file}' is damaged: {wrong.lstrip('.')}; restore it, or run again in a new folder"
        )
    return results


def _of(what: str, fits: Callable[[Any], bool]) -> _Check:
    def check(value: Any) -> Iterator[str]:
        if not fits(value):
            shown = repr(value)
            yield f" is {shown if len(shown) <= 40 else shown[:37] + '...'}; expected {what}"

    return check


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_TEXT = _of("text", lambda value: isinstance(value, str))
_COUNT = _of("a whole number", _is_count)
_AMOUNT = _of("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
_FIGURE = _of("a finite number or null", lambda value: value is None or _is_number(value))
_PER_CENT = _of(
    "a number from 0 to 100 or null",
    lambda value: value is None or (_is_number(value) and 0 <= value <= 100),
)
_NAME = _of("text or null", lambda value: value is None or isinstance(value, str))
_SCALE = _of(
    "a number, numbers by pattern, or null",
    lambda value: (
        value is None
        or _is_number(value)
        or (isinstance(value, dict) and len(value) > 0 and all(map(_is_number, value.values())))
    ),
)


def _list(each: _Check) -> _Check:
    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, list) or not value:
            yield from _of("a list", lambda _: False)(value)
            return
        for place, item in enumerate(value):
            yield from (f"[{place}]{wrong}" for wrong in each(item))

    return check


def _mapping(each: _Check) -> _Check:
    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield from _of("an object", lambda _: False)(value)
            return
        for key, item in value.items():
            yield from (f".{key}{wrong}" for wrong in each(item))

    return check


def _entries(needed: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None) -> _Check:
    checks = {**needed, **(optional or {})}

    def check(value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield from _of("an object", lambda _: False)(value)
            return
        for key, item in checks.items():
            if key in value:
                yield from (f".{key}{wrong}" for wrong in item(value[key]))
            elif key in needed:
                yield f".{key} is missing"

    return check


_TASK = _entries(
    {
        "name": _TEXT,
        "classes": _list(_COUNT),
        "class_names": _list(_TEXT),
        "train_images": _COUNT,
        "test_images": _COUNT,
    },
    {"held_out_images": _COUNT},
)
_METHOD = _entries(
    {
        "accuracy": _of("a number from 0 to 100", lambda v: _is_number(v) and 0 <= v <= 100),
        "metrics": _mapping(_FIGURE),
        "matrix": _list(_list(_PER_CENT)),
        "matrix_task_aware": _list(_list(_PER_CENT)),
        "seen": _list(_PER_CENT),
        "training": _NAME,
        "merger": _NAME,
        "scale": _SCALE,
    },
    {"statistics": _NAME, "chosen_scales": _list(_SCALE)},
)
_COST = _entries({"seconds": _AMOUNT, "peak_memory": _COUNT, "peak_device_memory": _COUNT})
_RESULTS = _entries(
    {
        "method": _TEXT,
        "seed": _COUNT,
        "data": _TEXT,
        "model": _TEXT,
        "scenario": _TEXT,
        "tasks": _list(_TASK),
        "methods": _mapping(_METHOD),
        "training": _mapping(_list(_COST)),
        "total": _COST,
    },
    {"finished": _TEXT, "versions": _mapping(_TEXT), "machine": _mapping(_of("", lambda _: True))},
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
