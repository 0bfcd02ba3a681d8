"""A single run as a suite of one setting and one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cl_merge.benchmarks.json_files import read_json
from cl_merge.benchmarks.methods import Method, find_method
from cl_merge.benchmarks.suite.definition import Setting, Suite
from cl_merge.benchmarks.suite.plan import DONE, Cell, Job
from cl_merge.benchmarks.suite.summary import METRICS, Entry, Figure, Found, Summary
from cl_merge.config import read_yaml
from cl_merge.errors import InputError
from cl_merge.mergers.locate import is_location


def summary_of_run(folder: str | Path) -> Summary:
    """Read a finished run as if it were a suite of its own.

    Args:
        folder: The run's, with ``config.yaml`` and ``results.json``.

    Returns:
        The summary: one column, a row for each method.

    Raises:
        InputError: If no run has finished there, or the file of one of its mergers has gone.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    if results is None:
        raise InputError(f"'{folder}' holds no finished run: it has no results.json")
    words = _words(folder, results)
    methods = {find_method(word): word for word in words}
    training = str(results["methods"][results["method"]].get("training") or "sequential")
    setting = Setting(results["data"], _tasks(results))
    suite = Suite(
        name=folder.resolve().name,
        about=f"{results['method']} on {setting.data_name} with {results['model']}, a single run",
        settings=(setting,),
        methods=tuple(methods.values()),
        shown=tuple(methods.values()),
        seeds=(int(results["seed"]),),
    )
    names = tuple(method.name for method in methods)
    job = _Here(setting, suite.seeds[0], training, names, config={})
    found = {m: _found(Cell(setting, m.name, job.seed, job), results, folder) for m in methods}
    ranks = _ranks(found)
    entries = {
        (setting.name, method.name): Entry(
            setting,
            method.name,
            {
                name: Figure({job.seed: cell.metrics[name]})
                for name in METRICS
                if name in cell.metrics
            },
            None,
            ranks.get(method),
            (cell,),
        )
        for method, cell in found.items()
    }
    return Summary(suite, folder, entries)


class _Here(Job):
    """A job whose folder is the suite's."""

    @property
    def place(self) -> str:
        return "."


def _words(folder: Path, results: dict[str, Any]) -> list[str]:
    """What names each method of a run, in the order of its results."""
    config: Any = OmegaConf.to_container(read_yaml(folder / "config.yaml"))
    compare = config.get("compare")
    given = [config.get("method"), *(compare if isinstance(compare, list) else [compare])]
    # A merger of the user's has a place in a file, and a name of its own in the results.
    places = [word for word in given if isinstance(word, str) and is_location(word)]
    own = {find_method(place).name: place for place in places}
    return [own.get(name, name) for name in results["methods"]]


def _tasks(results: dict[str, Any]) -> int | None:
    return None if results["scenario"] == "domain" else len(results["tasks"])


def _found(cell: Cell, results: dict[str, Any], folder: Path) -> Found:
    result = results["methods"][cell.method]
    total = results["total"]
    metrics = {name: x for name, x in result["metrics"].items() if x is not None}
    metrics |= {
        "seconds": total["seconds"],
        "peak_memory": max(total["peak_memory"], total["peak_device_memory"]),
    }
    if result["merger"]:
        vectors = folder.glob(f"task_vectors/{result['training']}/*.safetensors")
        metrics["stored_bytes"] = sum(file.stat().st_size for file in vectors)
    tasks = tuple(task["name"] for task in results["tasks"])
    return Found(cell, DONE, cell.job.place, metrics, result, tasks)


def _ranks(found: dict[Method, Found]) -> dict[Method, int]:
    means = {m: f.metrics["accuracy"] for m, f in found.items() if m.merger}
    best = sorted(means, key=lambda method: -means[method])[:2]
    return {method: rank for rank, method in enumerate(best, start=1)}
