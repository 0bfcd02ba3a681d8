"""What a smaller store of task vectors costs: accuracy of finished runs, merged from each store.

    python -m cl_merge.benchmarks.studies.store_accuracy runs/plain-0 runs/plain-1 runs/plain-2

Takes the float32 task vectors that `cl-merge run` has left, stores each in fewer bits, and merges
and evaluates what comes back. The training is not repeated: it does not depend on the store.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.errors import InputError
from cl_merge.mergers import get_merger
from cl_merge.storage.quantize import STORES, stored
from cl_merge.task_vectors.task_vector import TaskVector


def measure(folder: Path, training: str, method: str) -> dict[str, float]:
    """Evaluate one run's merged model from each store.

    Args:
        folder: Of the run.
        training: Whose task vectors, such as ``"sequential"``.
        method: What merges them, at its published scale.

    Returns:
        Accuracy on all test images in per cent, by store.
    """
    replay = RunEvaluator.of(folder)
    found = {}
    for store in STORES:
        merger = get_merger(method)
        for vector in task_vectors(folder / "task_vectors" / training):
            merger.update(stored(vector, store))
        found[store] = replay.accuracy(merger.items(), merger.published_scale)
    return found


def main() -> None:
    """Measure every run, and print a table of means and spreads."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--methods", nargs="+", default=["magmax", "average", "ties"])
    parser.add_argument("--trainings", nargs="+", default=["sequential", "independent"])
    arguments = parser.parse_args()
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("trained", "merged", *STORES):
        table.add_column(column)
    for training in arguments.trainings:
        for method in arguments.methods:
            runs = [measure(folder, training, method) for folder in arguments.runs]
            cells = [mean_and_spread([run[store] for run in runs]) for store in STORES]
            table.add_row(training, method, *cells)
    Console().print(table)


def task_vectors(folder: Path) -> Iterator[TaskVector]:
    """Read the task vectors in a folder one after another, in the order of the tasks.

    Args:
        folder: Where they lie.

    Returns:
        An iterator over them.

    Raises:
        InputError: If there are none.
    """
    files = sorted(folder.glob("task*.safetensors"), key=lambda file: int(file.stem[4:]))
    if not files:
        raise InputError(f"there are no task vectors in '{folder}'")
    return (TaskVector.load(file) for file in files)


def mean_and_spread(values: list[float]) -> str:
    """Write mean and sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


if __name__ == "__main__":
    main()
