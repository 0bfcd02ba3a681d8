"""The finished runs of a suite, as its folders tell."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.methods.method import METHODS, TRAININGS
from cl_merge.benchmarks.runs.results import parse_results
from cl_merge.errors import InputError, unknown_name
from cl_merge.task_vectors.task_vector import TaskVector

_PLACE = re.compile(r"seed(\d+)")


@dataclass(frozen=True)
class SuiteRun:
    """A finished run of a suite: a training of a setting with one seed.

    Attributes:
        folder: Where it lies.
        seed: Its seed.
        training: Its training.
    """

    folder: Path
    seed: int
    training: str

    @cached_property
    def results(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return parse_results(self._content, self._file)

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever ``results.json`` does."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.results["tasks"])

    @property
    def test_images(self) -> int:
        """Number of test images of all tasks."""
        return sum(task["test_images"] for task in self.results["tasks"])

    @property
    def vectors_folder(self) -> Path:
        """Where its task vectors lie."""
        return self.folder / "task_vectors" / self.training

    @property
    def has_vectors(self) -> bool:
        """Whether all of its task vectors are there."""
        files = (self.vectors_folder / f"task{i}.safetensors" for i in range(self.tasks))
        return all(file.exists() for file in files)

    def vectors(self) -> Iterator[TaskVector]:
        """Load the task vectors one after another.

        Yields:
            Those of the tasks in order; none is held here while the next one is made.

        Raises:
            InputError: If one is missing or damaged.
        """
        return (
            TaskVector.load(self.vectors_folder / f"task{index}.safetensors")
            for index in range(self.tasks)
        )

    @property
    def _file(self) -> Path:
        return self.folder / "results.json"

    # Read once, so that the fingerprint is that of the results in use.
    @cached_property
    def _content(self) -> bytes:
        return self._file.read_bytes()


@dataclass(frozen=True)
class Setting:
    """A data set in a number of tasks, and the runs of it that have finished.

    Attributes:
        name: As its folder is called.
        data: As the folder of its joint training is called, which all settings of a data set share.
        runs: In the order of seeds and trainings.
        joint: Those of joint training.
    """

    name: str
    data: str
    runs: tuple[SuiteRun, ...]
    joint: tuple[SuiteRun, ...] = ()

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.runs[0].tasks

    @property
    def title(self) -> str:
        """For people, such as ``cifar100 in 10 tasks``."""
        return f"{self.data} in {self.tasks} task{'s' if self.tasks > 1 else ''}"

    def methods(self, joint: bool = True) -> dict[str, list[dict[str, Any]]]:
        """The results of each method, one for each seed.

        Args:
            joint: Whether joint training counts, too.

        Returns:
            Parts of ``results.json`` by name of the method, in the order of the tables. What
            several runs of a seed hold, as zero-shot, is there once.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for run in (*self.runs, *(self.joint if joint else ())):
            for name, result in run.results["methods"].items():
                if name == "zero-shot" and run in self.joint:
                    continue  # its matrix may be of another number of tasks
                found.setdefault(name, {}).setdefault(run.seed, result)
        return {
            name: [found[name][seed] for seed in sorted(found[name])]
            for name in in_table_order(found)
        }


def find_settings(folder: str | Path, names: Sequence[str] | None = None) -> list[Setting]:
    """Find the settings of a suite that have finished runs.

    Args:
        folder: The suite's, with runs in ``SETTING/seedN/TRAINING``.
        names: Which settings; None for all.

    Returns:
        The settings, sorted by data set and number of tasks. A folder with nothing but joint
        training is no setting of its own.

    Raises:
        InputError: If a setting has no folder at all.
    """
    folder = Path(folder)
    there = sorted(path.name for path in folder.iterdir() if any(path.glob("seed*")))
    for name in names or ():
        if name not in there:
            raise unknown_name(f"setting in '{folder}'", name, there)
    settings = []
    for name in names or there:
        runs = _runs(folder / name)
        own = tuple(run for run in runs if not TRAININGS[run.training].joint)
        # Joint training is the same whatever the number of tasks: its folder is the data set's.
        data = name if name in there and _is_joint(runs, own) else re.sub(r"-\d+$", "", name)
        joint = [run for run in _runs(folder / data) if TRAININGS[run.training].joint]
        if own:
            settings.append(Setting(name, data, own, tuple(joint)))
    return sorted(settings, key=lambda setting: (setting.data, setting.tasks, setting.name))


def _is_joint(runs: Sequence[SuiteRun], own: Sequence[SuiteRun]) -> bool:
    return len(own) < len(runs)


def _runs(folder: Path) -> list[SuiteRun]:
    found = []
    for file in folder.glob("seed*/*/results.json"):
        seed = _PLACE.fullmatch(file.parent.parent.name)
        if seed and file.parent.name in TRAININGS:
            found.append(SuiteRun(file.parent, int(seed[1]), file.parent.name))
    order = list(TRAININGS)
    return sorted(found, key=lambda run: (run.seed, order.index(run.training)))


def in_table_order(names: Iterable[str]) -> list[str]:
    """Sort methods.

    Args:
        names: Of methods.

    Returns:
        The same in the order of the tables; those that are not in them last.
    """
    order = {name: place for place, name in enumerate(METHODS)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def check_vectors(run: SuiteRun) -> None:
    """Make sure that a run has left its task vectors.

    Args:
        run: The run.

    Raises:
        InputError: If one is missing; says where it should be.
    """
    if not run.has_vectors:
        raise InputError(
            f"'{run.vectors_folder}' does not hold the {run.tasks} task vectors of the run; run it "
            "again, or leave out the figures of task vectors"
        )
