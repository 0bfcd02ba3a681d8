"""What the studies share: taking turns, processes of their own, tables, random work, old runs."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from cl_merge.benchmarks.formatting import rounded
from cl_merge.errors import InputError
from cl_merge.task_vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from cl_merge.models.classifier import CLIPClassifier

T = TypeVar("T")

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Lightning trainer that does nothing but train."""

_CLASSES = 100


class Stopwatch:
    """Adds up the seconds of stretches of work, with the device's queue drained at both ends."""

    def __init__(self) -> None:
        self.wall = 0.0  # on the clock
        self.cpu = 0.0  # of processors, over all threads of this process

    def start(self) -> None:
        """Begin a stretch."""
        _drain()
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def stop(self) -> None:
        """End the stretch."""
        _drain()
        self.wall += time.perf_counter()
        self.cpu += time.process_time()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one or more measurements."""
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        if self.least == self.most:
            return f"{self.median:{spec}}"
        return f"{self.median:{spec}} ({self.least:{spec}}-{self.most:{spec}})"


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


def alone(module: str, alternative: str, *more: str) -> dict[str, float]:
    """Measure one alternative in a process of its own, which inherits no memory and no caches.

    The module's command is started again with the arguments of this one, `more`, and
    ``--only ALTERNATIVE``; it prints a line of JSON last.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:], *more, "--only", alternative]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own module
    if done.returncode:
        raise RuntimeError(f"measuring '{alternative}' failed:\n{done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def tell(found: Mapping[str, float]) -> None:
    """Print what was measured, for the process that called `alone`."""
    sys.stdout.write(json.dumps(found) + "\n")


def new_parser(about: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help begins with the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(about or "").split("\n")[0])


def runs_by_setting(about: str | None, measure: Callable[[Path], T]) -> dict[str, list[T]]:
    """Measure the runs that the command line names, and group what was found by their setting."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    parser = new_parser(about)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    return by_setting(parser.parse_args().runs, measure)


def new_table(title: str | None, *columns: str) -> Any:
    """Make an empty rich table; its first column holds names, the others figures."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def show(*parts: Any) -> None:
    """Print tables and lines, with no line of a table cut where the output is a file."""
    from rich.console import Console

    console = Console(highlight=False, width=200)
    for part in parts:
        console.print(part)


def random_work(model: str, count: int) -> tuple[CLIPClassifier, Tensor, Tensor]:
    """Make a classifier of 100 random classes, and random images with labels; needs no files."""
    from cl_merge.models.classifier import CLIPClassifier
    from cl_merge.models.zero_shot import ZeroShotHead

    visual, size = _encoder(model)
    images, labels = torch.randn(count, 3, size, size), torch.randint(0, _CLASSES, (count,))
    with torch.no_grad():
        width = visual.eval()(images[:1]).shape[1]
    rows = 100 * nn.functional.normalize(torch.randn(_CLASSES, width), dim=1)
    head = ZeroShotHead(rows, [f"class {i}" for i in range(_CLASSES)])
    return CLIPClassifier(visual, head, warmup_steps=0), images, labels


def task_vectors(run: Path, training: str = "sequential") -> Iterator[TaskVector]:
    """Read the task vectors that a training of a run has left, one after another."""
    folder = run / "task_vectors" / training
    files = sorted(folder.glob("task*.safetensors"), key=lambda file: int(file.stem[4:]))
    if not files:
        raise InputError(f"there are no task vectors in '{folder}'")
    return (TaskVector.load(file) for file in files)


def by_setting(runs: Iterable[Path], measure: Callable[[Path], T]) -> dict[str, list[T]]:
    """Measure runs of a suite, and group what was found by their setting: SETTING/seedN/RUN."""
    found: dict[str, list[T]] = {}
    for run in runs:
        found.setdefault(run.resolve().parts[-3], []).append(measure(run))
    return found


def mean_and_spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Write the mean and, of several values, their sample standard deviation: 1.50 ± 0.71."""
    spread = f" ± {rounded(statistics.stdev(values), digits)}" if len(values) > 1 else ""
    return rounded(statistics.mean(values), digits, sign) + spread


def _encoder(name: str) -> tuple[nn.Module, int]:
    import open_clip

    from cl_merge.models.pretrained import load_clip

    model: Any
    if name in open_clip.list_models():
        model = open_clip.create_model(name, load_weights=False)
    else:
        model = load_clip(name).model
    size = model.visual.image_size
    return model.visual, size if isinstance(size, int) else size[0]


def _drain() -> None:
    """Wait until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
