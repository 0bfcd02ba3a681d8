"""The folder that a run leaves behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from lightning.pytorch.utilities import rank_zero_only
from msgspec import Meta, Struct
from torch import Tensor

from cl_merge.benchmarks.runs.provenance import processor
from cl_merge.benchmarks.runs.results import Amount, Count, Percent, Scale, read_results
from cl_merge.benchmarks.runs.settings import check_same_run
from cl_merge.config.reading import to_yaml
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError
from cl_merge.storage.files import atomic_write, remove_leftovers
from cl_merge.training.cost import Cost
from cl_merge.training.journal import Journal, is_first_process, only_process

log = logging.getLogger(__name__)


class _Session(Struct):
    """A record of the journal: when it was written; the first of each session says no more."""

    session: Count
    seconds: Amount


class _Row(_Session):
    method: str
    task: Count
    counts: Annotated[list[list[Count]], Meta(min_length=3, max_length=3)]


class _Probed(_Session):
    probe: str
    of: str
    task: Count
    accuracy: Percent


class _ChosenScale(_Session):
    chose: str
    task: Count
    scale: Scale


# What a record is, by a key that no other kind has.
_KINDS: dict[str, type[_Session]] = {"method": _Row, "probe": _Probed, "chose": _ChosenScale}

# Processes that Lightning launches for a run inherit the folder that the first one chose.
_CHOSEN = "CL_MERGE_RUN_FOLDER"


class RunFolder:
    """Where a run writes: a journal of what is done, and each file complete or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._journal = Journal(self.path / "journal.jsonl")
        self._check_journal()
        sessions = {r["session"]: r["seconds"] for r in self._journal.records}
        # How long the run took before it was stopped, up to its last journal entry.
        self.seconds_before = float(sum(sessions.values()))
        self._session = 1 + max(sessions, default=0)
        self._began = time.monotonic()
        self._held = ExitStack()
        self._results: tuple[int, dict[str, Any]] | None = None  # with when they were written

    @classmethod
    def claim(cls, config: RunConfig, name: str) -> RunFolder:
        """Create or take over the folder of a run, and hold it against other processes.

        Without ``out`` it is a new folder under ``runs/``, called `name`.
        """
        if not is_first_process():
            chosen = config.out or os.environ.get(_CHOSEN)
            if chosen is None:
                raise InputError("several processes need one folder to share: give out=FOLDER")
            return cls(Path(chosen).expanduser())
        path = Path(config.out).expanduser() if config.out else _unused(Path("runs") / name)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out={path}: cannot be created ({error.strerror})") from error
        held = ExitStack()
        held.enter_context(only_process(path))
        remove_leftovers(path)
        folder = cls(path)
        folder._held = held
        folder._keep(config)
        os.environ[_CHOSEN] = str(path)
        return folder

    def release(self) -> None:
        """Let other processes have the folder."""
        self._held.close()
        os.environ.pop(_CHOSEN, None)

    def task_vectors(self, training: str) -> Path:
        """The folder of what the tasks of a training have changed."""
        return self.path / "task_vectors" / training

    def statistics(self, method: str) -> Path:
        """The file of a method's class statistics."""
        return self.path / "statistics" / f"{method}.safetensors"

    def state_of(self, training: str) -> Path:
        """The folder of what a training needs to go on."""
        return self.path / "state" / training

    def rows(self, method: str) -> dict[int, Tensor]:
        """The rows of a method's accuracy matrix that are done: counts, int64 [3, T], by index."""
        found = [r for r in self._journal.records if r.get("method") == method]
        return {record["task"]: torch.tensor(record["counts"]) for record in found}

    def add_row(self, method: str, row: int, counts: Tensor) -> None:
        """Note that a row of a method's accuracy matrix is done: counts, int64 [3, T]."""
        self._note({"method": method, "task": row, "counts": counts.tolist()})

    def probes(self, method: str) -> dict[str, dict[int, float]]:
        """A method's accuracy on the data sets beside the stream, in per cent, by name and row."""
        found: dict[str, dict[int, float]] = {}
        for record in self._journal.records:
            if "probe" in record and record["of"] == method:
                found.setdefault(record["probe"], {})[record["task"]] = record["accuracy"]
        return found

    def add_probe(self, method: str, probe: str, row: int, accuracy: float) -> None:
        """Note a method's accuracy on a data set beside the stream, in per cent."""
        self._note({"probe": probe, "of": method, "task": row, "accuracy": accuracy})

    def chosen_scales(self, method: str) -> dict[int, Any]:
        """The scales that a method has chosen, by task, as of `Scales.plain`."""
        noted = {r["task"]: r["scale"] for r in self._journal.records if r.get("chose") == method}
        former = self.results().get("methods", {}).get(method, {})
        return noted or dict(enumerate(former.get("chosen_scales") or ()))

    def add_chosen_scale(self, method: str, task: int, scale: Any) -> None:
        """Note the scale that a method has chosen after a task, as of `Scales.plain`."""
        self._note({"chose": method, "task": task, "scale": scale})

    def results(self) -> dict[str, Any]:
        """What a run that has finished here found; empty if none has."""
        file = self.path / "results.json"
        # Asked for many times in a run, and long where there are many tasks and methods.
        changed = file.stat().st_mtime_ns if file.exists() else 0
        if self._results is None or self._results[0] != changed:
            self._results = changed, read_results(self.path) or {}
        return self._results[1]

    def finished_training(self, training: str) -> list[Cost] | None:
        """What the tasks of a training took, if all were learned in a run that finished."""
        costs = self.results().get("training", {}).get(training)
        return None if costs is None else msgspec.convert(costs, list[Cost])

    def finished_tasks(self, training: str, tasks: int) -> list[int]:
        """Which of so many tasks of a training will not be learned again."""
        if self.finished_training(training) is not None:
            return list(range(tasks))
        journal = Journal(self.state_of(training) / "journal.jsonl")
        return [task for task in range(tasks) if journal.find(done="task", task=task)]

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the content of ``results.json``, and remove what was only needed to go on."""
        content = json.dumps(results, indent=2, allow_nan=False)
        self._write_text("results.json", content + "\n")
        if is_first_process():
            shutil.rmtree(self.path / "state", ignore_errors=True)

    def _check_journal(self) -> None:
        """Make sure of the types of what is read later."""
        tasks: set[int] = set()
        for number, record in enumerate(self._journal.records, start=1):
            kind = next((kind for key, kind in _KINDS.items() if key in record), _Session)
            try:
                checked = msgspec.convert(record, kind)
                if isinstance(checked, _Row):
                    tasks |= {len(counts) for counts in checked.counts}
                if len(tasks) > 1:
                    raise msgspec.ValidationError("counts is of another number of tasks")
            except msgspec.ValidationError as error:
                raise InputError(
                    f"{self._journal.path}, line {number}: {error}; restore the file, or start "
                    "again in a new folder"
                ) from error

    def _note(self, record: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        self._journal.append(record | {"session": self._session, "seconds": seconds})

    def _keep(self, config: RunConfig) -> None:
        """Write the configuration, or check that it is the one the folder was made with."""
        file = self.path / "config.yaml"
        if file.exists():
            check_same_run(config, file)
        self._write_text("config.yaml", to_yaml(config))
        circumstances = {
            "torch": torch.__version__,
            "processor": processor(),
            "threads": torch.get_num_threads(),
        }
        former = [r["circumstances"] for r in self._journal.records if "circumstances" in r]
        # Earlier versions noted less.
        if former and any(circumstances.get(key) != value for key, value in former[-1].items()):
            log.warning(
                f"{self.path} was begun with {former[-1]} and goes on with {circumstances}: the "
                "results may differ in the last digits from those of one run"
            )
        self._note({"circumstances": circumstances})

    @rank_zero_only
    def _write_text(self, name: str, text: str) -> None:
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
