"""What a suite has found: its cells read back, averaged over seeds, with the paper's accuracies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from cl_merge.benchmarks.formatting import data_label
from cl_merge.benchmarks.methods.method import TRAININGS, Method, find_method, grouped_methods
from cl_merge.benchmarks.runs.results import finished_results, read_json, read_results
from cl_merge.benchmarks.suites import plan
from cl_merge.benchmarks.suites.definition import Setting, Suite
from cl_merge.benchmarks.suites.execution import LOG
from cl_merge.benchmarks.suites.plan import DONE, Cell, Job
from cl_merge.config.reading import read_yaml
from cl_merge.mergers.registry import is_location
from cl_merge.training.metrics import average_accuracy, transfer

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Metric:
    """Something that is measured of a method, or of the run that it shares with others."""

    title: str  # over a table, with the unit
    about: str
    unit: float = 1.0  # what a value is divided by to be in the unit of the title
    digits: int = 1
    better: int = 0  # 1 or -1 where more or less of it makes a method better


METRICS: dict[str, Metric] = {
    name: Metric(**own) for name, own in read_yaml(_FOLDER / "metrics.yaml").items()
}
"""What a cell can tell, by name; shares are in per cent."""

PAPER = read_yaml(_FOLDER / "paper" / "results.yaml")
"""Accuracies in per cent, by the paper's names of methods and data sets, some by tasks."""

WITHOUT_TASKS = ("accuracy", "seconds", "peak_memory", "stored_bytes")
"""What does not depend on the number of tasks of joint training, which is one run for any."""


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

    values: Mapping[int, float]  # or by number of the order

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
    axis: str = "seeds"  # what its values differ in, or "orders"

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
    folder, cells = Path(folder), plan.make_plan(suite) if cells is None else cells
    results = {job: read_results(folder / job.path) or {} for job in {cell.job for cell in cells}}
    found: dict[tuple[str, str], list[CellResult]] = {}
    for cell in cells:
        key = (cell.setting.name, cell.method)
        found.setdefault(key, []).append(_read(cell, folder, results[cell.job]))
    entries = {}
    for setting in suite.settings:
        metrics = {m.name: _over_seeds(found[setting.name, m.name]) for m in suite.rows}
        ranks = {name: _ranked(name, suite.rows, metrics) for name in METRICS}
        for method in suite.rows:
            key = (setting.name, method.name)
            entries[key] = Entry(
                setting,
                method,
                metrics[method.name],
                paper_accuracy(suite, setting, method),
                _ranks_of(method, ranks),
                tuple(found[key]),
            )
    return Summary(suite, folder, entries)


def over_orders(summary: Summary) -> Summary | None:
    """Put the orders of each data set together: what was a mean over seeds is a value of its order.

    None if none has several.
    """
    groups: dict[str, list[Setting]] = {}
    for setting in summary.suite.settings:
        groups.setdefault(setting.name_of_all_orders, []).append(setting)
    if all(len(group) == 1 for group in groups.values()):
        return None
    entries = {}
    for name, group in groups.items():
        # Joint training, one run for all orders, is one value of them.
        own: dict[str, list[Entry]] = {}
        found: dict[str, dict[str, SeedValues]] = {}
        for method in summary.suite.rows:
            every = [summary.entries[setting.name, method.name] for setting in group]
            own[method.name] = list({entry.cells[0].path: entry for entry in every}.values())
            of_orders = [entry.metrics for entry in own[method.name]]
            values = {
                metric: {n: of[metric].mean for n, of in enumerate(of_orders) if metric in of}
                for metric in METRICS
            }
            found[method.name] = {m: SeedValues(by) for m, by in values.items() if by}
        ranks = {metric: _ranked(metric, summary.suite.rows, found) for metric in METRICS}
        for method in summary.suite.rows:
            entries[name, method.name] = Entry(
                replace(group[0], order=None),
                method,
                found[method.name],
                None,
                _ranks_of(method, ranks),
                tuple(entry.cells[0] for entry in own[method.name]),
            )
    settings = tuple(replace(group[0], order=None) for group in groups.values())
    suite = replace(summary.suite, settings=settings)
    return Summary(suite, summary.folder, entries, axis="orders")


def _ranked(
    metric: str, methods: Sequence[Method], metrics: Mapping[str, Mapping[str, SeedValues]]
) -> dict[str, int]:
    """The best and the second best of the methods that merge; equal ones have the same rank."""
    better = METRICS[metric].better
    values = {
        m.name: better * metrics[m.name][metric].mean
        for m in methods
        if better and m.merger and metric in metrics[m.name]
    }
    best = sorted({*values.values()}, reverse=True)[:2]
    return {name: 1 + best.index(value) for name, value in values.items() if value in best}


def _ranks_of(method: Method, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {metric: best[method.name] for metric, best in ranks.items() if method.name in best}


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
    if suite.paper is None or setting.order is not None:
        return None
    row = PAPER.get(method.paper or "", {}).get(setting.data)
    value = row.get(setting.tasks) if isinstance(row, Mapping) else row
    return None if value is None else float(value)


def _read(cell: Cell, folder: Path, results: Mapping[str, Any]) -> CellResult:
    job, run_folder = cell.job, folder / cell.job.path
    result = results.get("methods", {}).get(cell.method)
    if result is None:
        state, reason = plan.state_of(job, folder), ""
        if state == plan.FAILED:
            failure = read_json(run_folder / plan.FAILURE) or {}
            reason = str(failure.get("reason", f"see {LOG}"))
        return CellResult(cell, plan.BEGUN if state == DONE else state, job.path, reason=reason)
    total = results["total"]
    metrics = {name: x for name, x in result["metrics"].items() if x is not None}
    metrics |= _multi_domain(result)
    metrics["seconds"] = total["seconds"]
    metrics["peak_memory"] = max(total["peak_memory"], total["peak_device_memory"])
    if result["merger"]:
        vectors = [*run_folder.glob(f"task_vectors/{result['training']}/*.safetensors")]
        # A run that was copied without them says nothing.
        metrics |= {"stored_bytes": sum(v.stat().st_size for v in vectors)} if vectors else {}
    own, tasks = cell.setting, len(results["tasks"])
    same = own.tasks in (None, tasks) and own.order is None
    if TRAININGS[job.training].joint and not same:
        metrics = {name: x for name, x in metrics.items() if name in WITHOUT_TASKS}
    return CellResult(cell, DONE, job.path, metrics, result)


def _multi_domain(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of multi-domain streams: of both matrices, if all their rows were evaluated."""
    found = {}
    for prefix, key in (("", "matrix"), ("task_aware_", "matrix_task_aware")):
        given = [[math.nan if x is None else x for x in row] for row in result[key]]
        rows = torch.tensor(given, dtype=torch.float64)
        if len(rows) < 2 or len(rows) != rows.shape[1]:
            continue
        found[f"{prefix}transfer"] = transfer(rows)
        found[f"{prefix}matrix_average"] = float(rows.mean())
        if prefix:
            found[f"{prefix}last"] = average_accuracy(rows)
    return {name: x for name, x in found.items() if math.isfinite(x)}


def _over_seeds(cells: Sequence[CellResult]) -> dict[str, SeedValues]:
    values = {
        name: {cell.cell.seed: cell.metrics[name] for cell in cells if name in cell.metrics}
        for name in METRICS
    }
    return {name: SeedValues(own) for name, own in values.items() if own}


def summary_of_run(folder: str | Path) -> Summary:
    """Read a finished run as if it were a suite of its own: one column, a row for each method."""
    folder = Path(folder)
    results = finished_results(folder)
    methods = {find_method(word).name: word for word in _words(folder, results)}
    data = data_label(results["data"])
    tasks = None if results["scenario"] == "domain" else len(results["tasks"])
    setting, seed = Setting(results["data"], tasks), int(results["seed"])
    suite = Suite(
        name=folder.resolve().name,
        about=f"{results['method']} on {data} with {results['model']}, a single run",
        settings=(setting,),
        methods=tuple(methods.values()),
        shown=tuple(methods.values()),
        seeds=(seed,),
    )
    training = str(results["methods"][results["method"]].get("training") or "sequential")
    job = _JobHere(setting, seed, training, tuple(methods), config={})
    return summarize(suite, folder, [Cell(setting, name, seed, job) for name in methods])


class _JobHere(Job):
    """A job whose folder is the suite's."""

    path = "."


def _words(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """What names each method of a run, in the order of its results."""
    config = read_yaml(folder / "config.yaml")
    compare = config.get("compare")
    given = [config.get("method"), *(compare if isinstance(compare, list) else [compare])]
    # A merger of the user's has a path in a file, and a name of its own in the results.
    paths = [word for word in given if isinstance(word, str) and is_location(word)]
    own = {find_method(path).name: path for path in paths}
    return [own.get(name, name) for name in results["methods"]]
