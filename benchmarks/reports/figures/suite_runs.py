"""The finished runs of a suite, as its folders tell."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.formatting import counted
from cl_merge.benchmarks.methods.method import METHODS, TRAININGS
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.errors import InputError
from cl_merge.task_vectors.task_vector import TaskVector


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
    def is_joint(self) -> bool:
        """Whether it trained on all tasks as one."""
        return TRAININGS[self.training].joint

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
    runs: tuple[SuiteRun, ...]  # in the order of seeds and trainings
    joint: tuple[SuiteRun, ...] = ()

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.runs[0].tasks

    @property
    def title(self) -> str:
        """For people, such as ``cifar100 in 10 tasks``."""
        return f"{self.data} in {counted(self.tasks, 'task')}"

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
        return {
            name: [found[name][seed] for seed in sorted(found[name])]
            for name in in_table_order(found)
        }


def find_settings(folder: str | Path) -> list[SettingRuns]:
    """Find the settings of a suite that have finished runs, by data set and number of tasks.

    A folder with nothing but joint training is no setting of its own.
    """
    found: dict[str, list[SuiteRun]] = {}
    for file in Path(folder).glob("*/seed*/*/results.json"):
        setting, seed, training = file.parts[-4:-1]
        if training in TRAININGS and seed.removeprefix("seed").isdecimal():
            run = SuiteRun(file.parent, int(seed.removeprefix("seed")), training)
            found.setdefault(setting, []).append(run)
    settings = []
    for name, runs in found.items():
        own = _in_order(run for run in runs if not run.is_joint)
        # Joint training is the same whatever the number of tasks: its folder is the data set's.
        data = name if len(own) < len(runs) else re.sub(r"-\d+$", "", name)
        joint = _in_order(run for run in found.get(data, ()) if run.is_joint)
        if own:
            settings.append(SettingRuns(name, data, own, joint))
    return sorted(settings, key=lambda setting: (setting.data, setting.tasks, setting.name))


def _in_order(runs: Iterable[SuiteRun]) -> tuple[SuiteRun, ...]:
    order = list(TRAININGS)
    return tuple(sorted(runs, key=lambda run: (run.seed, order.index(run.training))))


def in_table_order(names: Iterable[str]) -> list[str]:
    """Sort methods in the order of the tables; those that are not in them last."""
    order = {name: index for index, name in enumerate(METHODS)}
    return sorted(names, key=lambda name: order.get(name, len(order)))
