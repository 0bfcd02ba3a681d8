"""What the runs of a suite say of themselves beyond their accuracies: machine, time, files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cl_merge.benchmarks.formatting import counted, duration
from cl_merge.benchmarks.reports.html.cells import STATES
from cl_merge.benchmarks.reports.summary import CellResult, Summary
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import DONE

_FILES = ("results.json", "config.yaml", LOG)


@dataclass(frozen=True)
class RunFacts:
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
        return {"place": self.path, "config": self.config, "links": self.links, "tasks": tasks}


def read_runs(summary: Summary, page: Path) -> dict[str, RunFacts]:
    """Read the runs of a summary by path, with links from where the page will be."""
    cells: dict[str, list[CellResult]] = {}
    for cell in summary.cells:
        cells.setdefault(cell.path, []).append(cell)
    return {path: _read(summary.folder, path, own, page) for path, own in cells.items()}


def _read(folder: Path, path: str, cells: list[CellResult], page: Path) -> RunFacts:
    where = folder / path
    # A run that was asked for more methods has some and lacks others.
    states = [cell.state for cell in cells]
    try:
        config = (where / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = ""
    return RunFacts(
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


def facts_of(summary: Summary, runs: Mapping[str, RunFacts]) -> Iterator[tuple[str, str]]:
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


def _distinct(runs: Iterable[RunFacts], *keys: str) -> list[str]:
    """What runs say under a key of their results, each once, in the order of the runs."""
    found: dict[str, None] = {}
    for run in runs:
        value: Any = run.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[str(value)] = None
    return list(found)


def _machine(run: RunFacts) -> str:
    machine: Any = run.results.get("machine", {})
    threads = counted(int(machine.get("threads", 1)), "thread")
    return ", ".join(str(x) for x in (machine.get("device"), threads, machine.get("platform")) if x)
