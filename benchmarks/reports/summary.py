"""What a suite has found: its cells read back, averaged over seeds, beside the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from omegaconf import OmegaConf

from cl_merge.benchmarks.methods.method import TRAININGS, Method
from cl_merge.benchmarks.runs.json_files import read_json
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.suites.definition import Setting, Suite
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, FAILURE, Cell, make_plan, state_of

_Key = TypeVar("_Key", bound=Hashable)

METRICS: dict[str, str] = {
    "accuracy": "accuracy on all test images among all classes after the last task, micro average",
    "average_accuracy": "the same as the mean over tasks, macro average",
    "task_aware_accuracy": "accuracy among the classes of the image's own task",
    "average_incremental_accuracy": "mean over tasks of the accuracy on everything seen so far",
    "forgetting": "mean over tasks of the best accuracy before the last task less the last",
    "backward_transfer": "mean over tasks of the accuracy after the last task less that after it",
    "forward_transfer": "mean over tasks of the accuracy just before it less zero-shot",
    "seconds": "of the whole run, which serves all methods that share its training",
    "peak_memory": "bytes, of the run",
    "stored_bytes": "bytes of task vectors that the run keeps",
}
"""What a cell can tell, by name; shares are in per cent."""

# Of joint training, which is one run for any number of tasks, only what does not depend on it.
_WITHOUT_TASKS = ("accuracy", "seconds", "peak_memory", "stored_bytes")


@dataclass(frozen=True)
class Found:
    """What is known of a cell.

    Attributes:
        cell: Which.
        state: `plan.DONE`, `FAILED`, `BEGUN` or `NEW`.
        place: Folder of its run within the suite's.
        metrics: What of `METRICS` it has.
        result: Its part of ``results.json``: matrix, scale and so on; empty unless it is done.
        tasks: Names of the tasks.
        reason: Why it failed.
    """

    cell: Cell
    state: str
    place: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure over seeds.

    Attributes:
        values: By seed.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Their mean; NaN if there are none."""
        return mean(self.values.values()) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Their sample standard deviation; NaN if there are fewer than two."""
        return stdev(self.values.values()) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Entry:
    """A place in the table: a method on a setting.

    Attributes:
        setting: The column.
        method: The row.
        figures: By name of the metric.
        paper: The paper's accuracy; None if it has none.
        rank: 1 for the best mean accuracy of the methods that merge, 2 for the second best, None
            for the others.
        cells: One for each seed.
    """

    setting: Setting
    method: str
    figures: Mapping[str, Figure]
    paper: float | None
    rank: int | None
    cells: tuple[Found, ...]


@dataclass(frozen=True)
class Summary:
    """All of a suite.

    Attributes:
        suite: The suite.
        folder: Where it lies.
        entries: By setting's name and method.
    """

    suite: Suite
    folder: Path
    entries: Mapping[tuple[str, str], Entry]

    @property
    def cells(self) -> list[Found]:
        """Every cell."""
        return [cell for entry in self.entries.values() for cell in entry.cells]


def summarize(suite: Suite, folder: str | Path, cells: Sequence[Cell] | None = None) -> Summary:
    """Read what a suite has found so far.

    Args:
        suite: The suite.
        folder: Where its runs lie.
        cells: Its cells, each with the job whose folder holds it; None for those of its plan.

    Returns:
        The summary; what has not run is in it, too, without figures.
    """
    folder, cache = Path(folder), dict[str, dict[str, Any]]()
    found: dict[tuple[str, str], list[Found]] = {}
    for cell in make_plan(suite) if cells is None else cells:
        key = (cell.setting.name, cell.method)
        found.setdefault(key, []).append(_read(cell, folder, cache))
    rows = suite.rows
    entries = {}
    for setting in suite.settings:
        own = {method: found[setting.name, method.name] for method in rows}
        figures = {method: _figures(of_method) for method, of_method in own.items()}
        ranks = ranked(
            {
                method: figures[method]["accuracy"].mean
                for method in rows
                if method.merger and "accuracy" in figures[method]
            }
        )
        for method in rows:
            entries[setting.name, method.name] = Entry(
                setting,
                method.name,
                figures[method],
                paper_accuracy(suite, setting, method),
                ranks.get(method),
                tuple(own[method]),
            )
    return Summary(suite, folder, entries)


def ranked(values: Mapping[_Key, float]) -> dict[_Key, int]:
    """Find the best and the second best.

    Args:
        values: Of which more is better.

    Returns:
        1 and 2 for the keys of the two largest values; of equal ones the first comes first.

    Example:
        >>> ranked({"a": 1.0, "b": 3.0, "c": 2.0})
        {'b': 1, 'c': 2}
    """
    best = sorted(values, key=lambda key: -values[key])[:2]
    return {key: rank for rank, key in enumerate(best, start=1)}


def paper_accuracy(suite: Suite, setting: Setting, method: Method) -> float | None:
    """What the paper reports.

    Args:
        suite: Says which of its tables is meant.
        setting: The column.
        method: The row.

    Returns:
        The accuracy in per cent; None if the paper does not have it.

    Example:
        >>> from cl_merge.benchmarks.methods.method import find_method
        >>> from cl_merge.benchmarks.suites.definition import find_suite
        >>> paper_accuracy(find_suite("table1"), Setting("cifar100", 10), find_method("magmax"))
        80.41

    Reference:
        Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, ECCV 2024,
        tables 1 and 2.
    """
    if suite.paper is None:
        return None
    row = _paper().get(method.paper or "", {}).get(setting.data)
    value = row.get(setting.tasks) if isinstance(row, Mapping) else row
    return None if value is None else float(value)


@cache
def _paper() -> dict[str, Any]:
    file = files("cl_merge.benchmarks.reports.paper").joinpath("results.yaml")
    found: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    return dict(found)


def _read(cell: Cell, folder: Path, cache: dict[str, dict[str, Any]]) -> Found:
    job, place = cell.job, folder / cell.job.place
    if job.place not in cache:
        cache[job.place] = read_results(place) or {}
    results = cache[job.place]
    result = results.get("methods", {}).get(cell.method)
    if result is None:
        state = state_of(job, folder)
        reason = _failure(place) if state == FAILED else ""
        return Found(cell, BEGUN if state == DONE else state, job.place, reason=reason)
    metrics = {name: x for name, x in result["metrics"].items() if x is not None}
    metrics |= {
        "seconds": results["total"]["seconds"],
        "peak_memory": max(results["total"]["peak_memory"], results["total"]["peak_device_memory"]),
    }
    if result["merger"]:
        vectors = place.glob(f"task_vectors/{result['training']}/*.safetensors")
        metrics["stored_bytes"] = sum(file.stat().st_size for file in vectors)
    joint = TRAININGS[job.training].joint
    if joint and cell.setting.tasks != job.setting.tasks:
        metrics = {name: x for name, x in metrics.items() if name in _WITHOUT_TASKS}
    tasks = tuple(task["name"] for task in results["tasks"])
    return Found(cell, DONE, job.place, metrics, result, tasks)


def _failure(place: Path) -> str:
    return str((read_json(place / FAILURE) or {}).get("reason", f"see {LOG}"))


def _figures(cells: Sequence[Found]) -> dict[str, Figure]:
    figures = {}
    for name in METRICS:
        values = {cell.cell.seed: cell.metrics[name] for cell in cells if name in cell.metrics}
        if values:
            figures[name] = Figure(values)
    return figures
