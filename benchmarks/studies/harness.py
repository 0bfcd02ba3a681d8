"""What the studies share: clocks, taking turns, processes of their own, tables, finished runs."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from cl_merge.benchmarks.formatting import rounded
from cl_merge.errors import InputError
from cl_merge.task_vectors.task_vector import TaskVector

T = TypeVar("T")

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Lightning trainer that does nothing but train."""


class Stopwatch:
    """Adds up the seconds of stretches of work, with the device's queue drained at both ends."""

    wall = 0.0  # on the clock
    cpu = 0.0  # of processors, over all threads of this process

    def start(self) -> None:
        """Begin a stretch."""
        self._add(-1)

    def stop(self) -> None:
        """End the stretch."""
        self._add(1)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _add(self, sign: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall += sign * time.perf_counter()
        self.cpu += sign * time.process_time()


def timed(owner: object, method: str) -> Stopwatch:
    """Time all calls of an object's method from now on."""
    watch, untimed = Stopwatch(), getattr(owner, method)

    def call(*arguments: Any, **options: Any) -> Any:
        with watch:
            return untimed(*arguments, **options)

    setattr(owner, method, call)
    return watch


def spread(values: Sequence[float], digits: int) -> str:
    """Write the median and the range of repeated measurements: 1.5 (1.0-3.0)."""
    median = f"{statistics.median(values):.{digits}f}"
    if min(values) == max(values):
        return median
    return f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def mean_and_spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Write the mean and, of several values, their sample standard deviation: 1.50 ± 0.71."""
    deviation = f" ± {rounded(statistics.stdev(values), digits)}" if len(values) > 1 else ""
    return rounded(statistics.mean(values), digits, sign) + deviation


def alternated(alternatives: Mapping[str, Callable[[], T]], repeat: int) -> dict[str, list[T]]:
    """Do all alternatives in turn, again and again, so that a busy moment hits all of them.

    Every second round goes backwards: none profits from coming after another. Returns what each
    returned, by name, round after round.
    """
    found: dict[str, list[T]] = {name: [] for name in alternatives}
    for turn in range(repeat):
        for name in list(alternatives)[:: -1 if turn % 2 else 1]:
            found[name].append(alternatives[name]())
    return found


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, which inherits no memory and no caches."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def new_parser(about: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help begins with the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(about or "").split("\n")[0])


def show(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, its first column of names and the others of figures, with no line cut."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    tell(table)


def tell(message: Any) -> None:
    """Print a message."""
    Console(highlight=False, width=200).print(message)


def task_vectors(run: Path, training: str = "sequential") -> Iterator[TaskVector]:
    """Read the task vectors that a training of a run has left, one after another."""
    folder = run / "task_vectors" / training
    files = sorted(folder.glob("task*.safetensors"), key=lambda file: int(file.stem[4:]))
    if not files:
        raise InputError(f"there are no task vectors in '{folder}'")
    return (TaskVector.load(file) for file in files)


def runs_by_setting(about: str | None, measure: Callable[[Path], T]) -> dict[str, list[T]]:
    """Measure the runs that the command line names, and group what was found by their setting.

    A run of a suite lies in SETTING/seedN/RUN.
    """
    logging.getLogger("lightning").setLevel(logging.ERROR)
    parser = new_parser(about)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    found: dict[str, list[T]] = {}
    for run in parser.parse_args().runs:
        found.setdefault(run.resolve().parts[-3], []).append(measure(run))
    return found
