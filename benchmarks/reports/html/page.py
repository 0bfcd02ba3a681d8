"""Write the report: everything in one file, from plain data and a template."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from cl_merge.benchmarks.formatting import counted, duration, rounded
from cl_merge.benchmarks.reports.figures.figure import Drawing
from cl_merge.benchmarks.reports.summary import METRICS, CellResult, Entry, Summary
from cl_merge.benchmarks.reports.tables import shown
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.suites.definition import Setting
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, NEW
from cl_merge.storage.files import atomic_write

_FILES = ("results.json", "config.yaml", LOG)
_STATES = {DONE: "done", FAILED: "failed", BEGUN: "unfinished", NEW: "not run"}
_STRENGTHS = (1.0, 3.0)  # points from which a difference to the paper counts as larger
_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

_Run = dict[str, Any]
"""A run of a suite as the template shows it; `_read_run` says what there is."""


def write_report(summary: Summary, drawings: Sequence[Drawing], path: str | Path) -> None:
    """Write the report of a suite or a run as one file, whose links to the runs are relative."""
    environment = Environment(
        loader=PackageLoader("cl_merge.benchmarks.reports.html", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(_content(summary, drawings, Path(path)))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _content(summary: Summary, drawings: Sequence[Drawing], page: Path) -> dict[str, Any]:
    """All that the template shows; what the script needs is in ``data``."""
    anchor = _Anchors()
    runs = _read_runs(summary, page)
    settings = _by_data(summary.suite.settings)
    columns = [_column(s, summary, runs, anchor) for s in settings]
    names = {setting.name for setting in settings}
    for number, column in enumerate(columns):
        column["first"] = not number or column["data"] != columns[number - 1]["data"]
        column["figures"] = [_figure(d, anchor) for d in drawings if d.setting == column["name"]]
    methods = [method for own in summary.groups.values() for method in own]
    about = {name: entry.method.about for (_, name), entry in summary.entries.items()}
    rows = [
        [
            _cell(summary.entries[s.name, method], list(runs), anchor("at", s.name, method))
            for s in settings
        ]
        for method in methods
    ]
    data = {
        "metrics": {name: [metric.title, metric.about] for name, metric in METRICS.items()},
        "settings": [setting.name for setting in settings],
        "methods": [[method, about[method]] for method in methods],
        "seeds": list(summary.suite.seeds),
        "runs": [_for_details(run) for run in runs.values()],
        "cells": rows,
    }
    return {
        "suite": summary.suite,
        "facts": list(_facts_of(summary, runs)),
        "failures": [run for run in runs.values() if run["state"] == _STATES[FAILED]],
        "data_sets": Counter(setting.data_name for setting in settings),
        "columns": columns,
        "groups": summary.groups,
        "rows": dict(zip(methods, rows, strict=True)),
        "figures": [_figure(d, anchor) for d in drawings if d.setting not in names],
        "data": data,
        "script_data": _for_script(data),
    }


class _Anchors:
    """Makes anchors: readable, and each given once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, *parts: str) -> str:
        words = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
        name = free = "-".join(filter(None, words)) or "x"
        number = 1
        while free in self._given:
            number += 1
            free = f"{name}.{number}"
        self._given.add(free)
        return free


def _by_data(settings: Sequence[Setting]) -> list[Setting]:
    """Settings of the same data set beside each other, otherwise as they come."""
    first = list(dict.fromkeys(setting.data_name for setting in settings))
    return sorted(settings, key=lambda setting: first.index(setting.data_name))


def _column(
    setting: Setting, summary: Summary, runs: Mapping[str, _Run], anchor: _Anchors
) -> dict[str, Any]:
    """A setting: a column of the table, and a section of the page."""
    entries = [entry for (name, _), entry in summary.entries.items() if name == setting.name]
    paths = dict.fromkeys(cell.path for entry in entries for cell in entry.cells)
    own = [runs[path] for path in paths]
    # Joint training may have counted its images by another number of tasks.
    like = [run for run in own if run["tasks"] and setting.tasks in (None, len(run["tasks"]))]
    tasks = like[0]["tasks"] if like else []
    number = setting.tasks or len(tasks)
    return {
        "id": anchor("setting", setting.name),
        "name": setting.name,
        "data": setting.data_name,
        "label": counted(number, "task") if number else "own tasks",
        "about": _about_tasks(like[0]["results"]) if like else "",
        "tasks": tasks,
        "tasks_seed": like[0]["seed"] if like else None,
        "runs": own,
    }


def _about_tasks(results: Mapping[str, Any]) -> str:
    tasks = results["tasks"]
    classes = {label for task in tasks for label in task["classes"]}
    train = sum(task["train_images"] for task in tasks)
    test = sum(task["test_images"] for task in tasks)
    return (
        f"{results['scenario']}-incremental: {counted(len(tasks), 'task')}, "
        f"{len(classes)} classes, {train:,} images to train on, {test:,} to test on; "
        f"model {results['model']}"
    )


def _cell(entry: Entry, runs: Sequence[str], anchor: str) -> dict[str, Any]:
    """Describe a cell of the table; its seeds refer to runs by their number."""
    states = {cell.state for cell in entry.cells}
    waiting = (word for state, word in _STATES.items() if state in states)
    return {
        "id": anchor,
        "figures": {name: _metric(entry, name) for name in METRICS if name in entry.metrics},
        "gap": _DASH if DONE in states else next(waiting),
        "begun": states != {NEW},
        "reasons": list(dict.fromkeys(cell.reason for cell in entry.cells if cell.reason)),
        "paper": _paper(entry),
        "seeds": [
            {
                "run": runs.index(cell.path),
                "state": _STATES[cell.state],
                **({"reason": cell.reason} if cell.reason else {}),
                **_details(cell.result),
            }
            for cell in entry.cells
        ],
    }


def _metric(entry: Entry, metric: str) -> dict[str, Any]:
    """A metric in words, and ``order``, the number that rows are sorted by."""
    words, found, kind = shown(entry, metric), entry.metrics[metric], METRICS[metric]
    values = [found.values.get(cell.cell.seed) for cell in entry.cells]
    return {
        "order": float(f"{found.mean:.8g}"),
        "mean": words.mean.replace("-", _MINUS),
        "spread": words.spread,
        "seeds": words.seeds,
        "rank": words.rank,
        "values": [
            "" if v is None else rounded(v / kind.unit, kind.digits + 1).replace("-", _MINUS)
            for v in values
        ],
    }


def _paper(entry: Entry) -> dict[str, Any] | None:
    """The paper's accuracy, ours less that, and from -3 to 3 how far and which way it is."""
    if entry.paper is None:
        return None
    value = rounded(entry.paper)
    if "accuracy" not in entry.metrics:
        return {"value": value, "difference": "", "strength": 0}
    difference = round(entry.metrics["accuracy"].mean - entry.paper, 1)
    strength = 1 + sum(abs(difference) >= least for least in _STRENGTHS)
    return {
        "value": value,
        "difference": rounded(difference, sign="+" if difference else "").replace("-", _MINUS),
        "strength": int(math.copysign(strength, difference)) if difference else 0,
    }


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: result[key] for key in ("scale", "merger", "training") if result.get(key)}
    for key, name in (("matrix", "matrix"), ("matrix_task_aware", "aware")):
        if rows := result.get(key):
            # Of a model that tasks do not change, one row says it all.
            same = all(row == rows[0] for row in rows)
            tenths = [[x and round(x, 1) for x in row] for row in rows[: 1 if same else None]]
            found[name] = {"steps": len(rows), "rows": tenths}
    return found


def _figure(drawing: Drawing, anchor: _Anchors) -> dict[str, Any]:
    return {
        "id": anchor("figure", drawing.title),
        "title": drawing.title,
        "caption": drawing.caption,
        "svg": drawing.svg,
        "columns": drawing.columns,
        "rows": [[_number(value) for value in row] for row in drawing.rows],
    }


def _number(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return "" if math.isnan(value) else f"{value:.6g}".replace("-", _MINUS)


def _for_details(run: _Run) -> dict[str, Any]:
    own = {key: run[key] for key in ("path", "config", "links", "state")}
    return {**own, "tasks": [task["name"] for task in run["tasks"]]}


def _for_script(data: Mapping[str, Any]) -> str:
    """Compact JSON that can stand in a ``<script>``: nothing in it can end one."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _read_runs(summary: Summary, page: Path) -> dict[str, _Run]:
    """Read the runs of a summary by path, with links from where the page will be."""
    cells: dict[str, list[CellResult]] = {}
    for cell in summary.cells:
        cells.setdefault(cell.path, []).append(cell)
    return {path: _read_run(summary.folder, path, own, page) for path, own in cells.items()}


def _read_run(folder: Path, path: str, cells: list[CellResult], page: Path) -> _Run:
    where = folder / path
    results, config = read_results(where) or {}, where / "config.yaml"
    # A run that was asked for more methods has some and lacks others.
    state = next((cell.state for cell in cells if cell.state != DONE), DONE)
    return {
        "path": path,
        "seed": cells[0].cell.seed,
        "state": _STATES[state],
        "reason": next((cell.reason for cell in cells if cell.reason), ""),
        "results": results,  # empty until it has finished, as what follows
        "tasks": results.get("tasks", []),
        "seconds": results.get("total", {}).get("seconds", 0.0),
        "config": config.read_text("utf-8", "replace") if config.is_file() else "",
        "links": {name: _link(where / name, page) for name in _FILES if (where / name).is_file()},
    }


def _link(path: Path, page: Path) -> str:
    """A relative address; it starts with a dot, so that no name can look like a scheme."""
    relative = os.path.relpath(path.resolve(), page.resolve().parent)
    return "./" + quote(Path(relative).as_posix())


def _facts_of(summary: Summary, runs: Mapping[str, _Run]) -> Iterator[tuple[str, str]]:
    """Say what was run, on what, and how far it is: terms and what they are, empty if unknown."""
    suite, every = summary.suite, list(runs.values())
    methods = len({method for _, method in summary.entries})
    counts = Counter(cell.state for cell in summary.cells)
    states = [f"{counts[s]} {word}" for s, word in _STATES.items() if counts[s] and s != DONE]
    seconds, finished = sum(run["seconds"] for run in every), [r for r in every if r["results"]]
    dates = sorted(_distinct(every, "finished"))
    packages = dict.fromkeys(name for run in every for name in run["results"].get("versions", {}))
    versions = {name: " and ".join(_distinct(every, "versions", name)) for name in packages}
    yield "model", ", ".join(_distinct(every, "model"))
    yield "seeds", ", ".join(map(str, suite.seeds))
    yield "table", f"{counted(methods, 'method')} by {counted(len(suite.settings), 'setting')}"
    yield "results", ", ".join([f"{counts[DONE]} of {counts.total()} done", *states])
    yield "time", f"{duration(seconds)} in {counted(len(finished), 'run')}" if seconds else ""
    yield "finished", " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    yield "machine", "; ".join(dict.fromkeys(map(_machine, finished)))
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _distinct(runs: Iterable[_Run], *keys: str) -> list[str]:
    """What runs say under a key of their results, each once, in the order of the runs."""
    found: dict[str, None] = {}
    for run in runs:
        value = run["results"]
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[str(value)] = None
    return list(found)


def _machine(run: _Run) -> str:
    machine = run["results"].get("machine", {})
    threads = counted(int(machine.get("threads", 1)), "thread")
    return ", ".join(str(x) for x in (machine.get("device"), threads, machine.get("platform")) if x)
