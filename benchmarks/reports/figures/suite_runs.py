"""The finished runs of a suite, as its folders tell, and what is measured of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cl_merge.benchmarks.formatting import counted
from cl_merge.benchmarks.methods.method import METHODS, TRAININGS
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.errors import InputError
from cl_merge.task_vectors.task_vector import TaskVector

T = TypeVar("T")

PLAIN = ("sequential", "independent")
"""The trainings that the paper compares, in the order of legends."""

Measures = Mapping[str, Any]
"""What one run showed, as plain values that JSON can hold."""


@dataclass(frozen=True)
class SuiteRun:
    """A finished run of a suite: a training of a setting with one seed."""

    folder: Path
    seed: int
    training: str

    @cached_property
    def results(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return finished_results(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever ``results.json`` does."""
        return hashlib.sha256((self.folder / "results.json").read_bytes()).hexdigest()

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.results["tasks"])

    @property
    def merging(self) -> dict[str, dict[str, Any]]:
        """Results of the methods that merge its training, each merged model once."""
        return {
            name: result
            for name, result in self.results["methods"].items()
            if result["merger"]
            and result["training"] == self.training
            and not result.get("statistics")  # of the same merged weights
        }

    @property
    def vector_files(self) -> list[Path]:
        """Where its task vectors lie, in the order of the tasks."""
        folder = self.folder / "task_vectors" / self.training
        return [folder / f"task{index}.safetensors" for index in range(self.tasks)]

    def vectors(self) -> Iterator[TaskVector]:
        """Load the task vectors one after another; none is held while the next one is made."""
        return (TaskVector.load(file) for file in self.vector_files)

    def check_vectors(self) -> None:
        """Make sure that the run has left its task vectors."""
        if not all(file.exists() for file in self.vector_files):
            raise InputError(
                f"'{self.vector_files[0].parent}' does not hold the {self.tasks} task vectors of "
                "the run; run it again, or leave out the figures of task vectors"
            )


@dataclass(frozen=True)
class SettingRuns:
    """A data set in a number of tasks, and the runs of it that have finished."""

    name: str  # as its folder is called
    data: str  # as the folder of its joint training is called, which serves all its settings
    order: str  # the seed of the order of its tasks; empty for the recipe's
    runs: tuple[SuiteRun, ...]  # in the order of seeds and trainings
    joint: tuple[SuiteRun, ...] = ()

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.runs[0].tasks

    @property
    def title(self) -> str:
        """For people, such as ``cifar100 in 10 tasks``."""
        order = f", order {self.order}" if self.order else ""
        return f"{self.data} in {counted(self.tasks, 'task')}{order}"

    def methods(self, joint: bool = True) -> dict[str, list[dict[str, Any]]]:
        """The results of each method by seed, in the order of the tables.

        What several runs of a seed hold, as zero-shot, is there once; that of joint training is
        left out, since its matrix may be of another number of tasks.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for run in (*self.runs, *(self.joint if joint else ())):
            for name, result in run.results["methods"].items():
                if not (name == "zero-shot" and run in self.joint):
                    found.setdefault(name, {}).setdefault(run.seed, result)
        return {name: list(found[name].values()) for name in in_table_order(found)}


@dataclass(frozen=True)
class Measured:
    """What was measured of the runs of a setting: by training, in the order of the seeds."""

    setting: SettingRuns
    found: dict[str, list[Measures]] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        """Of how many seeds something was measured."""
        return max(map(len, self.found.values()), default=0)

    def by_training(self, read: Callable[[list[Measures]], T]) -> dict[str, T]:
        """Read something off the measures of each of the plain trainings that has some."""
        return {
            training: read(self.found[training]) for training in PLAIN if training in self.found
        }


def find_settings(folder: str | Path) -> list[SettingRuns]:
    """Find the settings of a suite that have finished runs, by data set and number of tasks.

    A folder with nothing but joint training is no setting of its own.
    """
    runs = []
    for file in Path(folder).glob("*/seed*/*/results.json"):
        seed, training = file.parts[-3].removeprefix("seed"), file.parts[-2]
        # A method that weighs elements has a run of its own beside those of its training.
        of = [index for index, own in enumerate(TRAININGS) if f"{training}-".startswith(f"{own}-")]
        if of and seed.isdecimal():
            runs.append((int(seed), of[-1], training, SuiteRun(file.parent, int(seed), training)))
    found: dict[str, list[SuiteRun]] = {}
    joint: dict[str, list[SuiteRun]] = {}
    for *_, run in sorted(runs, key=lambda run: run[:3]):
        kind = joint if run.training == "joint" else found
        kind.setdefault(run.folder.parts[-3], []).append(run)
    settings = []
    for name, own in found.items():
        # Joint training is the same whatever the number and order of tasks: its folder is the data
        # set's.
        first, dash, order = name.rpartition("-order")
        plain, order = (first, order) if dash and order.isdecimal() else (name, "")
        data = plain if plain in joint else plain.removesuffix(f"-{own[0].tasks}")
        settings.append(SettingRuns(name, data, order, tuple(own), tuple(joint.get(data, ()))))
    return sorted(settings, key=lambda setting: (setting.data, setting.tasks, setting.name))


def in_table_order(names: Iterable[str]) -> list[str]:
    """Sort methods in the order of the tables; those that are not in them last."""
    order = {name: index for index, name in enumerate(METHODS)}
    return sorted(names, key=lambda name: order.get(name, len(order)))
