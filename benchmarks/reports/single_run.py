"""A single run as a suite of one setting and one seed, for its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_merge.benchmarks.formatting import data_label
from cl_merge.benchmarks.methods.method import find_method
from cl_merge.benchmarks.reports.summary import Summary, summarize
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.suites.definition import Setting, Suite
from cl_merge.benchmarks.suites.plan import Cell, Job
from cl_merge.config.reading import read_yaml
from cl_merge.mergers.registry import is_location


def summary_of_run(folder: str | Path) -> Summary:
    """Read a finished run as if it were a suite of its own: one column, a row for each method."""
    folder = Path(folder)
    results = finished_results(folder)
    methods = {find_method(word): word for word in _words(folder, results)}
    data = data_label(results["data"])
    tasks = None if results["scenario"] == "domain" else len(results["tasks"])
    setting = Setting(results["data"], tasks)
    suite = Suite(
        name=folder.resolve().name,
        about=f"{results['method']} on {data} with {results['model']}, a single run",
        settings=(setting,),
        methods=tuple(methods.values()),
        shown=tuple(methods.values()),
        seeds=(int(results["seed"]),),
    )
    training = str(results["methods"][results["method"]].get("training") or "sequential")
    names = tuple(method.name for method in methods)
    job = _JobHere(setting, suite.seeds[0], training, names, config={})
    return summarize(suite, folder, [Cell(setting, name, job.seed, job) for name in names])


class _JobHere(Job):
    """A job whose folder is the suite's."""

    @property
    def path(self) -> str:
        return "."


def _words(folder: Path, results: dict[str, Any]) -> list[str]:
    """What names each method of a run, in the order of its results."""
    config = read_yaml(folder / "config.yaml")
    compare = config.get("compare")
    given = [config.get("method"), *(compare if isinstance(compare, list) else [compare])]
    # A merger of the user's has a path in a file, and a name of its own in the results.
    paths = [word for word in given if isinstance(word, str) and is_location(word)]
    own = {find_method(path).name: path for path in paths}
    return [own.get(name, name) for name in results["methods"]]
