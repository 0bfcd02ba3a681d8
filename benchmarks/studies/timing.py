"""Time alternatives against each other on a machine that does other things, too."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Adds up what stretches of work take, the device's queue drained at both ends of each.

    Attributes:
        wall: Seconds on the clock.
        cpu: Seconds of processors, over all threads of this process.

    Example:
        >>> watch = Stopwatch()
        >>> with watch:
        ...     total = sum(range(1000))
        >>> watch.wall > 0
        True
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.cpu = 0.0

    def start(self) -> None:
        """Begin a stretch."""
        drain()
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def stop(self) -> None:
        """End the stretch."""
        drain()
        self.wall += time.perf_counter()
        self.cpu += time.process_time()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements.

    Attributes:
        median: The median.
        least: The least.
        most: The most.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise measurements.

        Args:
            values: One or more.

        Returns:
            Their median and range.

        Example:
            >>> f"{Spread.of([3.0, 1.0, 1.5]):.1f}"
            '1.5 (1.0-3.0)'
        """
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}}-{self.most:{spec}})"


def alternated(alternatives: Mapping[str, Callable[[], T]], repeat: int) -> dict[str, list[T]]:
    """Do all alternatives in turn, again and again, so that a busy moment hits all of them.

    Every second round goes backwards: none profits from coming after another.

    Args:
        alternatives: What to do, by name.
        repeat: How many rounds.

    Returns:
        What each returned, by name, round after round.

    Example:
        >>> said = []
        >>> found = alternated({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 2)
        >>> said
        ['a', 'b', 'b', 'a']
    """
    found: dict[str, list[T]] = {name: [] for name in alternatives}
    for turn in range(repeat):
        for name in list(alternatives)[:: -1 if turn % 2 else 1]:
            found[name].append(alternatives[name]())
    return found


def alone(module: str, what: str, *more: str) -> dict[str, float]:
    """Measure one alternative in a process of its own, which inherits no memory and no caches.

    Args:
        module: The module whose command is running; it is started again with the same arguments.
        what: The alternative, handed to it as ``--only``.
        *more: Further arguments.

    Returns:
        What it prints last, a line of JSON.

    Raises:
        RuntimeError: If it fails; says how.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:], *more, "--only", what]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own module
    if done.returncode:
        raise RuntimeError(f"measuring '{what}' failed:\n{done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def drain() -> None:
    """Wait until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def new_table(title: str, *columns: str) -> Any:
    """Make a table of figures.

    Args:
        title: What stands above it.
        *columns: The first holds names, the others figures.

    Returns:
        An empty rich table.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table
