"""What a suite has found: its cells read back, averaged over seeds, with the paper's accuracies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from cl_merge.benchmarks.methods.method import TRAININGS, Method, grouped_methods
from cl_merge.benchmarks.runs.results import read_json, read_results
from cl_merge.benchmarks.suites.definition import Setting, Suite
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, FAILURE, Cell, make_plan, state_of


@dataclass(frozen=True)
class Metric:
    """Something that is measured of a method, or of the run that it shares with others."""

    title: str  # over a table, with the unit
    about: str
    unit: float = 1.0  # what a value is divided by to be in the unit of the title
    digits: int = 1
    better: int = 0  # 1 or -1 where more or less of it makes a method better


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "accuracy, %",
        "accuracy on all test images among all classes after the last task, micro average",
        better=1,
    ),
    "average_accuracy": Metric(
        "macro average accuracy, %", "the same as the mean over tasks, macro average", better=1
    ),
    "task_aware_accuracy": Metric(
        "task-aware accuracy, %", "accuracy among the classes of the image's own task", better=1
    ),
    "average_incremental_accuracy": Metric(
        "average incremental accuracy, %",
        "mean over tasks of the accuracy on everything seen so far",
        better=1,
    ),
    "forgetting": Metric(
        "forgetting, points",
        "mean over tasks of the best accuracy before the last task less the last",
        better=-1,
    ),
    "backward_transfer": Metric(
        "backward transfer, points",
        "mean over tasks of the accuracy after the last task less that after it",
        better=1,
    ),
    "forward_transfer": Metric(
        "forward transfer, points",
        "mean over tasks of the accuracy just before it less zero-shot",
        better=1,
    ),
    "seconds": Metric(
        "time, minutes", "of the whole run, which serves all methods that share its training", 60.0
    ),
    "peak_memory": Metric("peak memory, GiB", "bytes, of the run", 2.0**30),
    "stored_bytes": Metric("stored, MB", "bytes of task vectors that the run keeps", 1e6, 0),
}
"""What a cell can tell, by name; shares are in per cent."""

# Of joint training, which is one run for any number of tasks, only what does not depend on it.
_WITHOUT_TASKS = ("accuracy", "seconds", "peak_memory", "stored_bytes")


@dataclass(frozen=True)
class CellResult:
    """What is known of a cell."""

    cell: Cell
    state: str  # `plan.DONE`, `FAILED`, `BEGUN` or `NEW`
    path: str  # of its run's folder within the suite's
    metrics: Mapping[str, float] = field(default_factory=dict)  # as far as it has them
    result: Mapping[str, Any] = field(default_factory=dict)  # its part of ``results.json``
    reason: str = ""  # why it failed


@dataclass(frozen=True)
class SeedValues:
    """The values of a metric, by seed."""

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
    """A method on a setting, over the seeds."""

    setting: Setting
    method: Method
    metrics: Mapping[str, SeedValues]
    paper: float | None  # the paper's accuracy, if it has one
    ranks: Mapping[str, int]  # by metric 1 and 2 for the best means of the methods that merge
    cells: tuple[CellResult, ...]  # one for each seed


@dataclass(frozen=True)
class Summary:
    """All of a suite: its entries by setting's name and method."""

    suite: Suite
    folder: Path
    entries: Mapping[tuple[str, str], Entry]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The names of its methods, in the groups of a table."""
        methods = [entry.method for entry in self.entries.values()]
        return grouped_methods({method.name: method.training for method in methods})

    @property
    def cells(self) -> list[CellResult]:
        """Every cell."""
        return [cell for entry in self.entries.values() for cell in entry.cells]


def summarize(suite: Suite, folder: str | Path, cells: Sequence[Cell] | None = None) -> Summary:
    """Read what cells, by default a suite's plan, have found so far; some may lack metrics."""
    folder, cells = Path(folder), make_plan(suite) if cells is None else cells
    results = {job: read_results(folder / job.path) or {} for job in {cell.job for cell in cells}}
    found: dict[tuple[str, str], list[CellResult]] = {}
    for cell in cells:
        key = (cell.setting.name, cell.method)
        found.setdefault(key, []).append(_read(cell, folder, results[cell.job]))
    rows = suite.rows
    entries = {}
    for setting in suite.settings:
        own = {method: found[setting.name, method.name] for method in rows}
        metrics = {method: _over_seeds(of_method) for method, of_method in own.items()}
        ranks = {name: _ranked(name, metrics) for name in METRICS}
        for method in rows:
            entries[setting.name, method.name] = Entry(
                setting,
                method,
                metrics[method],
                paper_accuracy(suite, setting, method),
                {name: of_all[method] for name, of_all in ranks.items() if method in of_all},
                tuple(own[method]),
            )
    return Summary(suite, folder, entries)


def _ranked(name: str, metrics: Mapping[Method, Mapping[str, SeedValues]]) -> dict[Method, int]:
    """The best and the second best of the methods that merge; the first of equal ones."""
    better = METRICS[name].better
    values = {
        method: better * own[name].mean
        for method, own in metrics.items()
        if better and method.merger and name in own
    }
    best = sorted(values, key=lambda method: -values[method])[:2]
    return {method: rank for rank, method in enumerate(best, start=1)}


def paper_accuracy(suite: Suite, setting: Setting, method: Method) -> float | None:
    """The accuracy in per cent that the paper reports; None if it does not have it.

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


def _read(cell: Cell, folder: Path, results: Mapping[str, Any]) -> CellResult:
    job, run_folder = cell.job, folder / cell.job.path
    result = results.get("methods", {}).get(cell.method)
    if result is None:
        state = state_of(job, folder)
        reason = _failure(run_folder) if state == FAILED else ""
        return CellResult(cell, BEGUN if state == DONE else state, job.path, reason=reason)
    total = results["total"]
    metrics = {name: x for name, x in result["metrics"].items() if x is not None}
    metrics["seconds"] = total["seconds"]
    metrics["peak_memory"] = max(total["peak_memory"], total["peak_device_memory"])
    if result["merger"]:
        vectors = run_folder.glob(f"task_vectors/{result['training']}/*.safetensors")
        metrics["stored_bytes"] = sum(file.stat().st_size for file in vectors)
    joint = TRAININGS[job.training].joint
    if joint and cell.setting.tasks != job.setting.tasks:
        metrics = {name: x for name, x in metrics.items() if name in _WITHOUT_TASKS}
    return CellResult(cell, DONE, job.path, metrics, result)


def _failure(run_folder: Path) -> str:
    return str((read_json(run_folder / FAILURE) or {}).get("reason", f"see {LOG}"))


def _over_seeds(cells: Sequence[CellResult]) -> dict[str, SeedValues]:
    values = {
        name: {cell.cell.seed: cell.metrics[name] for cell in cells if name in cell.metrics}
        for name in METRICS
    }
    return {name: SeedValues(own) for name, own in values.items() if own}
