"""What the folders of a suite's runs say of themselves, beyond their figures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cl_merge.benchmarks.reports.summary import Found, Summary
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import DONE

FILES = ("results.json", "config.yaml", LOG)


@dataclass(frozen=True)
class RunFacts:
    """A run of a suite.

    Attributes:
        place: Its folder within the suite's.
        training: What it trains.
        seed: Its seed.
        state: How far it is.
        reason: Why it failed.
        results: The content of its ``results.json``; empty until it has finished.
        config: The text of its ``config.yaml``.
        links: Where its files lie, seen from the page, by name; only those that are there.
    """

    place: str
    training: str
    seed: int
    state: str
    reason: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Mapping[str, Any]]:
        """Its tasks, as in ``results.json``."""
        return list(self.results.get("tasks", ()))

    @property
    def seconds(self) -> float:
        """How long it took; 0 until it has finished."""
        return float(self.results.get("total", {}).get("seconds", 0.0))


def read_runs(summary: Summary, page: Path) -> dict[str, RunFacts]:
    """Read the runs of a summary.

    Args:
        summary: Of a suite.
        page: Where the page will be, for the links.

    Returns:
        The runs by place, in the order of the table's columns.
    """
    cells: dict[str, list[Found]] = {}
    for cell in summary.cells:
        cells.setdefault(cell.place, []).append(cell)
    return {place: _read(summary.folder, place, own, page) for place, own in cells.items()}


def distinct(runs: Iterable[RunFacts], *keys: str) -> list[str]:
    """Collect what runs say under a key of their results.

    Args:
        runs: The runs.
        *keys: From the outermost to the innermost.

    Returns:
        What was found, each once, in the order of the runs.
    """
    found: dict[str, None] = {}
    for run in runs:
        value: Any = run.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[str(value)] = None
    return list(found)


def _read(folder: Path, place: str, cells: list[Found], page: Path) -> RunFacts:
    where = folder / place
    # A run that was asked for more methods has some and lacks others.
    states = [cell.state for cell in cells]
    state = next((s for s in states if s != DONE), DONE)
    return RunFacts(
        place=place,
        training=cells[0].cell.job.training,
        seed=cells[0].cell.seed,
        state=state,
        reason=next((cell.reason for cell in cells if cell.reason), ""),
        results=read_results(where) or {},
        config=_text(where / "config.yaml"),
        links={name: _link(where / name, page) for name in FILES if (where / name).is_file()},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _link(path: Path, page: Path) -> str:
    """A relative address; it starts with a dot, so that no name can look like a scheme."""
    relative = os.path.relpath(path.resolve(), page.resolve().parent)
    return "./" + quote(Path(relative).as_posix())
