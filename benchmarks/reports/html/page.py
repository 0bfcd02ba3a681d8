"""Write the report: everything in one file, from plain data and a template."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from cl_merge.benchmarks.formatting import counted, duration, rounded
from cl_merge.benchmarks.reports.figures.style import Drawing
from cl_merge.benchmarks.reports.summary import METRICS, CellResult, Entry, Metric, Summary
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
_Run = dict[str, Any]  # as `_read_runs` makes it


def write_report(summary: Summary, drawings: Sequence[Drawing], path: str | Path) -> None:
    """Write the report of a suite or a run as one file, whose links to the runs are relative."""
    content = _content(summary, Path(path)) | {"figures": drawings}
    page = html_templates().get_template("report.html").render(content)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def html_templates() -> Environment:
    """The templates of this folder, strict, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("cl_merge.benchmarks.reports.html", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": counted, "duration": duration, "number": _number}
    compact = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    environment.policies["json.dumps_kwargs"] = compact
    return environment


def element_id(*words: str) -> str:
    """The id of an element, which an address can hold as it is."""
    return quote("-".join(words), safe="")


def metric_text(value: float, metric: Metric, more: int = 0) -> str:
    """Write a value of a metric in its unit, with so many more digits than usual."""
    return rounded(value / metric.unit, metric.digits + more).replace("-", _MINUS)


def _content(summary: Summary, page: Path) -> dict[str, Any]:
    """All that the template shows; what the script needs is in ``data``."""
    runs = _read_runs(summary, page)
    finished = [run["results"] for run in runs.values() if run["results"]]
    counts = Counter(cell.state for cell in summary.cells)
    first = list(dict.fromkeys(setting.data_name for setting in summary.suite.settings))
    # Settings of the same data set beside each other, otherwise as they come.
    settings = sorted(summary.suite.settings, key=lambda setting: first.index(setting.data_name))
    about = {name: entry.method.about for (_, name), entry in summary.entries.items()}
    methods = [method for own in summary.groups.values() for method in own]
    rows = {
        method: [_cell(summary.entries[s.name, method], list(runs)) for s in settings]
        for method in methods
    }
    details = ("path", "config", "links", "state")
    return {
        "suite": summary.suite,
        "states": [f"{counts[s]} {word}" for s, word in _STATES.items() if counts[s] and s != DONE],
        "done": f"{counts[DONE]} of {counts.total()} done",
        "finished": finished,
        "machines": dict.fromkeys(map(_machine, finished)),
        "versions": _versions(finished),
        "runs": list(runs.values()),
        "data_sets": Counter(setting.data_name for setting in settings),
        "columns": [_column(setting, summary, runs) for setting in settings],
        "groups": summary.groups,
        "rows": rows,
        "data": {
            "metrics": {name: [metric.title, metric.about] for name, metric in METRICS.items()},
            "settings": [setting.name for setting in settings],
            "methods": [[method, about[method]] for method in methods],
            "seeds": list(summary.suite.seeds),
            "runs": [
                {key: run[key] for key in details}
                | {"tasks": [task["name"] for task in run["tasks"]]}
                for run in runs.values()
            ],
            "cells": list(rows.values()),
        },
    }


def _column(setting: Setting, summary: Summary, runs: Mapping[str, _Run]) -> dict[str, Any]:
    """A setting: a column of the table, and a section of the page."""
    entries = [entry for (name, _), entry in summary.entries.items() if name == setting.name]
    paths = dict.fromkeys(cell.path for entry in entries for cell in entry.cells)
    own = [runs[path] for path in paths]
    # Joint training may have counted its images by another number of tasks.
    like = [run for run in own if run["tasks"] and setting.tasks in (None, len(run["tasks"]))]
    number = setting.tasks or (len(like[0]["tasks"]) if like else 0)
    order = "" if setting.order is None else f", order {setting.order}"
    return {
        "id": element_id("setting", setting.name),
        "name": setting.name,
        "data": setting.data_name,
        "label": (counted(number, "task") if number else "own tasks") + order,
        "example": like[0] if like else None,  # a run that tells what the tasks are
        "runs": own,
    }


def _cell(entry: Entry, runs: Sequence[str]) -> dict[str, Any]:
    """Describe a cell of the table; its seeds refer to runs by their number."""
    states = {cell.state for cell in entry.cells}
    waiting = (word for state, word in _STATES.items() if state in states)
    return {
        "id": element_id("at", entry.setting.name, entry.method.name),
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
        "values": ["" if v is None else metric_text(v, kind, more=1) for v in values],
    }


def _paper(entry: Entry) -> dict[str, Any] | None:
    """The paper's accuracy, ours less that, and from -3 to 3 how far and which way it is."""
    if entry.paper is None:
        return None
    difference = shown(entry, "accuracy").difference  # empty until something has run
    points = float(difference or 0.0)
    strength = 1 + sum(abs(points) >= least for least in _STRENGTHS)
    return {
        "value": rounded(entry.paper),
        "difference": difference.replace("-", _MINUS),
        "strength": int(math.copysign(strength, points)) if points else 0,
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


def _number(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return "" if math.isnan(value) else f"{value:.6g}".replace("-", _MINUS)


def _read_runs(summary: Summary, page: Path) -> dict[str, _Run]:
    """Read the runs of a summary by path, with links from where the page will be."""
    by_path: dict[str, list[CellResult]] = {}
    for cell in summary.cells:
        by_path.setdefault(cell.path, []).append(cell)
    runs: dict[str, _Run] = {}
    for path, cells in by_path.items():
        folder = summary.folder / path
        results, config = read_results(folder) or {}, folder / "config.yaml"
        files = [folder / name for name in _FILES if (folder / name).is_file()]
        # A run that was asked for more methods has some and lacks others.
        state = next((cell.state for cell in cells if cell.state != DONE), DONE)
        runs[path] = {
            "path": path,
            "seed": cells[0].cell.seed,
            "state": _STATES[state],
            "reason": next((cell.reason for cell in cells if cell.reason), ""),
            "results": results,  # empty until it has finished, as what follows
            "tasks": results.get("tasks", []),
            "seconds": results.get("total", {}).get("seconds", 0.0),
            "config": config.read_text("utf-8", "replace") if config.is_file() else "",
            "links": {file.name: _link(file, page) for file in files},
        }
    return runs


def _link(path: Path, page: Path) -> str:
    """A relative address; it starts with a dot, so that no name can look like a scheme."""
    relative = os.path.relpath(path.resolve(), page.resolve().parent)
    return "./" + quote(Path(relative).as_posix())


def _versions(finished: Sequence[Mapping[str, Any]]) -> list[str]:
    """The packages of runs with their versions, each once."""
    found: dict[str, dict[str, None]] = {}
    for results in finished:
        for name, version in results.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    return [f"{name} {' and '.join(own)}" for name, own in found.items()]


def _machine(results: Mapping[str, Any]) -> str:
    machine = results.get("machine", {})
    threads = counted(int(machine.get("threads", 1)), "thread")
    device, *rest = map(machine.get, ("device", "processor", "platform"))
    return ", ".join(str(x) for x in (device, threads, *rest) if x)
