"""Write the report: everything in one file, from plain data and a template."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import DictLoader, Environment, StrictUndefined

from cl_merge.benchmarks.formatting import counted, duration
from cl_merge.benchmarks.methods.method import METHODS, find_method, grouped_methods
from cl_merge.benchmarks.reports.figures.figure import Drawing
from cl_merge.benchmarks.reports.html.cells import STATES, cell_of
from cl_merge.benchmarks.reports.summary import METRICS, CellResult, Summary
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.suites.definition import Setting
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import DONE, FAILED
from cl_merge.errors import InputError
from cl_merge.storage.files import atomic_write

_TEMPLATE, _STYLE, _SCRIPT = "report.html", "report.css", "report.js"
_FILES = ("results.json", "config.yaml", LOG)
_MINUS = "\N{MINUS SIGN}"


def write_report(summary: Summary, drawings: Sequence[Drawing], path: str | Path) -> None:
    """Write the report of a suite, or of a single run.

    Args:
        summary: Of the suite, or by `summary_of_run`.
        drawings: The figures that were drawn for it.
        path: The HTML file. It loads nothing from elsewhere; links to the runs' own files are
            relative to it. The same input gives the same bytes.

    Raises:
        StorageError: If the file cannot be written.
    """
    environment = Environment(
        loader=DictLoader({_TEMPLATE: _text(_TEMPLATE)}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(_content(summary, drawings, Path(path)))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(name: str) -> str:
    return files("cl_merge.benchmarks.reports.html").joinpath(name).read_text(encoding="utf-8")


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
    groups = _groups(summary)
    methods = [method for own in groups.values() for method in own]
    rows = [
        [
            cell_of(summary.entries[s.name, method], list(runs), anchor("at", s.name, method))
            for s in settings
        ]
        for method in methods
    ]
    data = {
        "metrics": {name: [metric.title, metric.about] for name, metric in METRICS.items()},
        "settings": [setting.name for setting in settings],
        "methods": [[method, _about(method)] for method in methods],
        "seeds": list(summary.suite.seeds),
        "runs": [{**run.shown, "state": STATES[run.state]} for run in runs.values()],
        "cells": rows,
    }
    return {
        "suite": summary.suite,
        "facts": list(_facts_of(summary, runs)),
        "failures": [run for run in runs.values() if run.state == FAILED],
        "data_sets": Counter(setting.data_name for setting in settings),
        "columns": columns,
        "groups": groups,
        "rows": dict(zip(methods, rows, strict=True)),
        "figures": [_figure(d, anchor) for d in drawings if d.setting not in names],
        "states": STATES,
        "data": data,
        "script_data": _for_script(data),
        "style": _text(_STYLE),
        "script": _text(_SCRIPT),
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


def _groups(summary: Summary) -> dict[str, list[str]]:
    trainings: dict[str, str | None] = {}
    for (_, method), entry in summary.entries.items():
        own = METHODS[method].training if method in METHODS else entry.cells[0].cell.job.training
        trainings.setdefault(method, own)
    return grouped_methods(trainings)


def _about(method: str) -> str:
    try:
        return find_method(method).about
    except InputError:
        return ""  # a user's own, which is known by its file only


def _column(
    setting: Setting, summary: Summary, runs: Mapping[str, _Run], anchor: _Anchors
) -> dict[str, Any]:
    """A setting: a column of the table, and a section of the page."""
    entries = [entry for (name, _), entry in summary.entries.items() if name == setting.name]
    paths = dict.fromkeys(cell.path for entry in entries for cell in entry.cells)
    own = [runs[path] for path in paths]
    # Joint training may have counted its images by another number of tasks.
    like = [r for r in own if r.tasks and (not setting.tasks or len(r.tasks) == setting.tasks)]
    tasks = like[0].tasks if like else []
    number = setting.tasks or len(tasks)
    return {
        "id": anchor("setting", setting.name),
        "name": setting.name,
        "data": setting.data_name,
        "label": counted(number, "task") if number else "own tasks",
        "about": _about_tasks(like[0].results) if like else "",
        "tasks": tasks,
        "tasks_seed": like[0].seed if like else None,
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


def _for_script(data: Mapping[str, Any]) -> str:
    """Compact JSON that can stand in a ``<script>``: nothing in it can end one."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@dataclass(frozen=True)
class _Run:
    """A run of a suite."""

    path: str  # of its folder within the suite's
    seed: int
    state: str
    reason: str  # why it failed
    results: Mapping[str, Any]  # the content of ``results.json``; empty until it has finished
    config: str  # the text of its ``config.yaml``
    links: Mapping[str, str]  # where those of its files lie that are there, seen from the page

    @property
    def tasks(self) -> list[Mapping[str, Any]]:
        """Its tasks, as in ``results.json``."""
        return list(self.results.get("tasks", ()))

    @property
    def seconds(self) -> float:
        """How long it took; 0 until it has finished."""
        return float(self.results.get("total", {}).get("seconds", 0.0))

    @property
    def shown(self) -> dict[str, Any]:
        """What the page's script needs of it."""
        tasks = [task["name"] for task in self.tasks]
        return {"path": self.path, "config": self.config, "links": self.links, "tasks": tasks}


def _read_runs(summary: Summary, page: Path) -> dict[str, _Run]:
    """Read the runs of a summary by path, with links from where the page will be."""
    cells: dict[str, list[CellResult]] = {}
    for cell in summary.cells:
        cells.setdefault(cell.path, []).append(cell)
    return {path: _read_run(summary.folder, path, own, page) for path, own in cells.items()}


def _read_run(folder: Path, path: str, cells: list[CellResult], page: Path) -> _Run:
    where = folder / path
    # A run that was asked for more methods has some and lacks others.
    states = [cell.state for cell in cells]
    try:
        config = (where / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = ""
    return _Run(
        path=path,
        seed=cells[0].cell.seed,
        state=next((state for state in states if state != DONE), DONE),
        reason=next((cell.reason for cell in cells if cell.reason), ""),
        results=read_results(where) or {},
        config=config,
        links={name: _link(where / name, page) for name in _FILES if (where / name).is_file()},
    )


def _link(path: Path, page: Path) -> str:
    """A relative address; it starts with a dot, so that no name can look like a scheme."""
    relative = os.path.relpath(path.resolve(), page.resolve().parent)
    return "./" + quote(Path(relative).as_posix())


def _facts_of(summary: Summary, runs: Mapping[str, _Run]) -> Iterator[tuple[str, str]]:
    """Say what was run, on what, and how far it is: terms and what they are, empty if unknown."""
    suite, every = summary.suite, list(runs.values())
    methods = len({method for _, method in summary.entries})
    counts = Counter(cell.state for cell in summary.cells)
    states = [f"{counts[s]} {word}" for s, word in STATES.items() if counts[s] and s != DONE]
    seconds, finished = sum(run.seconds for run in every), sum(bool(run.results) for run in every)
    dates = sorted(_distinct(every, "finished"))
    packages = dict.fromkeys(name for run in every for name in run.results.get("versions", {}))
    versions = {name: " and ".join(_distinct(every, "versions", name)) for name in packages}
    yield "model", ", ".join(_distinct(every, "model"))
    yield "seeds", ", ".join(map(str, suite.seeds))
    yield "table", f"{counted(methods, 'method')} by {counted(len(suite.settings), 'setting')}"
    yield "results", ", ".join([f"{counts[DONE]} of {counts.total()} done", *states])
    yield "time", f"{duration(seconds)} in {counted(finished, 'run')}" if seconds else ""
    yield "finished", " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    yield "machine", "; ".join(dict.fromkeys(_machine(run) for run in every if run.results))
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _distinct(runs: Iterable[_Run], *keys: str) -> list[str]:
    """What runs say under a key of their results, each once, in the order of the runs."""
    found: dict[str, None] = {}
    for run in runs:
        value: Any = run.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[str(value)] = None
    return list(found)


def _machine(run: _Run) -> str:
    machine: Any = run.results.get("machine", {})
    threads = counted(int(machine.get("threads", 1)), "thread")
    return ", ".join(str(x) for x in (machine.get("device"), threads, machine.get("platform")) if x)
