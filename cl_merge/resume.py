"""What a stream keeps on disk, so that a run that was killed goes on as if it had not been."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.files import atomic_write, load_state, remove_leftovers, save_state
from cl_merge.journal import Journal
from cl_merge.measure import Cost
from cl_merge.metrics import AccuracyMatrix
from cl_merge.stream import TaskStream

# Where our entry stands in a checkpoint of Lightning's.
_ENTRY = "cl_merge"


class StreamFolder:
    """The folder of a stream: a journal of finished tasks, and the state to go on from.

    The state is one file that is replaced in one step: within a task a checkpoint of Lightning's,
    after its training the weights and the states of the callbacks. Whatever instant a process dies
    at, the journal and that file fit together.

    Args:
        path: The folder; made if missing.

    Attributes:
        path: The folder.
        journal: What is finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._clean()
        self.journal = Journal(self.path / "journal.jsonl")
        self._state = load_state(self.state_file) if self.state_file.exists() else None

    @property
    def state_file(self) -> Path:
        """Where the state lies."""
        return self.path / "state.ckpt"

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The records of the finished tasks, in order."""
        return [record for record in self.journal.records if "task" in record]

    def check(self, description: dict[str, Any]) -> None:
        """Keep what the stream is, or check that it is what the folder was made for.

        Args:
            description: What must be the same for the folder to be of use, as plain values.

        Raises:
            InputError: If something differs; names it. If the state is missing.
        """
        if not self.journal.records:
            self.journal.append({"stream": description})
            return
        before, now = self.journal.records[0]["stream"], description
        for key in now:
            if before.get(key) != now[key]:
                raise InputError(
                    f"{self.path} was made for another stream: {key} was {_short(before.get(key))}"
                    f" and is {_short(now[key])}; name a new folder"
                )
        if self.finished and self._task < len(self.finished) - 1:
            raise InputError(
                f"{self.path}: the journal tells of {len(self.finished)} finished tasks, but "
                "state.ckpt is missing or older; restore it, or start again in a new folder"
            )

    def restore(self, model: L.LightningModule, callbacks: Sequence[Callback]) -> None:
        """Bring a model and callbacks to where the last task that was trained left them.

        Does nothing within a task, where Lightning restores them from its checkpoint.

        Args:
            model: The model.
            callbacks: Its callbacks, fresh.
        """
        if self._state is None or not self._state[_ENTRY]["trained"]:
            return
        model.load_state_dict(self._state["state_dict"])
        for callback in callbacks:
            if callback.state_key in self._state["callbacks"]:
                callback.load_state_dict(self._state["callbacks"][callback.state_key])
        self._state = {_ENTRY: self._state[_ENTRY]}

    def cost(self, task: int, *, trained: bool) -> Cost | None:
        """What a task has taken so far.

        Args:
            task: Its index.
            trained: Ask for a task whose training has ended, or for one in the middle of it.

        Returns:
            The cost; None if the state is not that of such a task.
        """
        entry = self._state[_ENTRY] if self._state else {"task": None, "trained": False}
        if (entry["task"], entry["trained"]) != (task, trained):
            return None
        return Cost(**entry["cost"])

    def save_trained(
        self, task: int, cost: Cost, model: L.LightningModule, callbacks: Sequence[Callback]
    ) -> None:
        """Keep what the training of a task left.

        Args:
            task: Index of the task.
            cost: What it took.
            model: The model.
            callbacks: Its callbacks.
        """
        states = {callback.state_key: callback.state_dict() for callback in callbacks}
        state = {
            _ENTRY: {"task": task, "trained": True, "cost": asdict(cost)},
            "state_dict": model.state_dict(),
            "callbacks": {key: state for key, state in states.items() if state},
        }
        if not getattr(rank_zero_only, "rank", 0):
            save_state(self.state_file, state)
        self._state = {_ENTRY: state[_ENTRY]}

    def finish(self, task: int, metrics: dict[str, float], cost: Cost, row: Any) -> None:
        """Note that nothing is left to do for a task.

        Args:
            task: Its index.
            metrics: What its evaluation logged.
            cost: What its training took.
            row: Its row of the accuracy matrix, as lists; None if there is none.
        """
        record = {"task": task, "metrics": metrics, "cost": asdict(cost), "row": row}
        self.journal.append(record)

    @property
    def _task(self) -> int:
        return -1 if self._state is None else int(self._state[_ENTRY]["task"])

    @rank_zero_only
    def _clean(self) -> None:
        remove_leftovers(self.path)


class KeepCheckpoints(Checkpoint):
    """Write a checkpoint at the end of an epoch, if the last one is long enough ago.

    The last epoch gets none on purpose: what works at a task's end, such as merging, needs a real
    end of training, so that a task killed there repeats its last epoch.

    Args:
        folder: Where to write.
        task: Index of the task.
        seconds: The least time between two checkpoints.
        before: What the task took before this process.
    """

    def __init__(self, folder: StreamFolder, task: int, seconds: float, before: Cost) -> None:
        super().__init__()
        self._folder = folder
        self._task = task
        self._seconds = seconds
        self._before = before
        self._began = self._last = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = time.monotonic() - self._last >= self._seconds and not _ends(trainer)
        # The clocks of the processes differ, but writing is something they do together.
        if trainer.strategy.broadcast(due):
            self._write(trainer)
            self._last = time.monotonic()

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        cost = Cost(
            self._before.seconds + time.monotonic() - self._began,
            self._before.peak_memory,
            self._before.peak_device_memory,
        )
        checkpoint[_ENTRY] = {"task": self._task, "trained": False, "cost": asdict(cost)}

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            # Gathering the state and waiting for its writer are done by all.
            trainer.save_checkpoint(self._folder.state_file)
            return
        with atomic_write(self._folder.state_file) as temporary:
            trainer.save_checkpoint(temporary)


def _ends(trainer: L.Trainer) -> bool:
    """Whether the epoch that is ending is the last one."""
    epochs = trainer.max_epochs
    return (
        trainer.should_stop
        or (epochs not in (None, -1) and trainer.current_epoch + 1 >= (epochs or 0))
        or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)
    )


def describe(stream: TaskStream, seed: int | None, evaluate: bool) -> dict[str, Any]:
    """What a stream is, as far as going on depends on it, as plain values."""
    return {
        "seed": seed,
        "evaluate": evaluate,
        "number of tasks": len(stream.tasks),
        "tasks": [
            {
                "name": task.name,
                "classes": list(task.class_names),
                "train": len(task.train),
                "test": len(task.test),
            }
            for task in stream.tasks
        ],
    }


def get_row(model: L.LightningModule, stream: TaskStream) -> list[list[int]] | None:
    """The row of the current task in a module's accuracy matrix, as lists; None if it has none."""
    matrix = getattr(model, "accuracy", None)
    if not isinstance(matrix, AccuracyMatrix) or stream.row not in matrix.rows:
        return None
    found: list[list[int]] = matrix.rows[stream.row].tolist()
    return found


def put_row(model: L.LightningModule, stream: TaskStream, row: list[list[int]] | None) -> None:
    """Put the row of the current task into the accuracy matrix of a module, made if missing."""
    if row is None:
        return
    matrix = getattr(model, "accuracy", None)
    if not isinstance(matrix, AccuracyMatrix):
        classes = [task.classes for task in stream.test_tasks]
        matrix = AccuracyMatrix(classes, len(stream.class_names))
        model.accuracy = matrix
    matrix.rows[stream.row] = torch.tensor(row)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
