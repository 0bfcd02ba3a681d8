"""The files of a stream, with which one that was killed resumes as if it had not been."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError, listing
from cl_merge.storage.files import check_state, load_state, remove_leftovers, save_state
from cl_merge.training.callback_state import state_of
from cl_merge.training.cost import Cost, Meter
from cl_merge.training.journal import Journal, is_first_process
from cl_merge.training.metrics import AccuracyMatrix

# A row of the accuracy matrix, [3, T], as lists.
Row = list[list[int]]

# The key of our entry in a checkpoint of Lightning's.
_ENTRY = "cl_merge"

_RESTORE = "; restore it, or start again in a new folder"


class StreamFolder:
    """The folder of a stream: a journal of what is done, and the state to go on from.

    The journal says what the stream is, for each task what its evaluation found (``done`` is
    ``evaluation``), and that it is finished (``task``). The state is one file that is replaced in
    one step: within a task a checkpoint of Lightning's, after its training the weights and the
    states of the callbacks. Whatever instant a process dies at, the two fit together; files that do
    not are refused with an `InputError`. Other processes of a run read what the first one wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.state_file = self.path / "state.ckpt"
        if is_first_process():
            remove_leftovers(self.path)
        self.journal = Journal(self.path / "journal.jsonl")
        self._state = {}
        if self.state_file.exists():
            # Tensors are mapped and read later: a bad disk shows now, or as wrong weights.
            check_state(self.state_file)
            self._state = load_state(self.state_file)

    def check(self, description: dict[str, Any]) -> None:
        """Write down what the stream is, or check that it is what the folder was made for."""
        records = self.journal.records
        if not records and not self._state:
            self.journal.append({"stream": description})
            return
        before = records[0].get("stream") if records else None
        if not isinstance(before, dict):
            raise InputError(
                f"{self.path}: journal.jsonl is missing, or that of something else{_RESTORE}"
            )
        for key in [*before, *description]:
            was, now = before.get(key), description.get(key)
            if was != now:
                raise InputError(
                    f"{self.path} was made for another stream: {key} was {_short(was)} and is "
                    f"{_short(now)}; name a new folder"
                )
        self._check_state(sum(record.get("done") == "task" for record in records))

    def _check_state(self, finished: int) -> None:
        """Check that the state is that of the last task that is finished, or of the next."""
        entry = self._state.get(_ENTRY)
        wrong = ""
        if not self._state:
            wrong = "missing" if finished else ""
        elif not isinstance(entry, dict):
            raise InputError(f"{self.state_file} is a checkpoint of something else{_RESTORE}")
        elif entry["task"] + entry["trained"] < finished:
            wrong = f"older, of task {entry['task']}"
        elif entry["task"] > finished:
            wrong = f"newer, of task {entry['task']}"
        if wrong:
            raise InputError(
                f"{self.path}: the journal tells of {finished} finished tasks, but state.ckpt is "
                f"{wrong}{_RESTORE}"
            )

    def restore(self, model: L.LightningModule, callbacks: Sequence[Callback]) -> None:
        """Bring model and callbacks to where the last trained task left them, if none is begun."""
        entry = self._state.get(_ENTRY)
        if entry is not None and entry["trained"]:
            try:
                model.load_state_dict(self._state["state_dict"])
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{self.state_file} is of another model: {reason}") from error
            for callback in callbacks:
                if (state := state_of(callback, self._state["callbacks"])) is not None:
                    callback.load_state_dict(state)
        # The rest is mapped from a file that is about to be replaced.
        self._state = {_ENTRY: entry} if entry is not None else {}

    def cost(self, task: int, *, trained: bool) -> Cost | None:
        """What a task has taken that is trained, or is being trained; None if it is not."""
        entry = self._state.get(_ENTRY)
        if entry is None or (entry["task"], entry["trained"]) != (task, trained):
            return None
        return Cost(**entry["cost"])

    def save_trained(
        self, task: int, cost: Cost, model: L.LightningModule, callbacks: Sequence[Callback]
    ) -> None:
        """Keep what the training of a task left."""
        states = {callback.state_key: callback.state_dict() for callback in callbacks}
        states = {key: state for key, state in states.items() if state}
        self._state = {_ENTRY: {"task": task, "trained": True, "cost": asdict(cost)}}
        if is_first_process():
            weights = {"state_dict": model.state_dict(), "callbacks": states}
            save_state(self.state_file, self._state | weights)


class KeepCheckpoints(Checkpoint):
    """Write a checkpoint at the end of an epoch, if the last one is long enough ago.

    The last epoch gets none: what works at a task's end, such as merging, needs a real end of
    training. Nor does any epoch where a schedule waits for a plateau: Lightning tells it the
    epoch's metric only later, and not at all when it resumes.
    """

    def __init__(self, folder: StreamFolder, task: int, seconds: float, meter: Meter) -> None:
        super().__init__()
        self._folder = folder
        self._task = task
        self._seconds = seconds
        self._meter = meter
        self._last = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        awaits_metric = any(s.reduce_on_plateau for s in trainer.lr_scheduler_configs)
        due = time.monotonic() - self._last >= self._seconds
        due = due and not _ends(trainer) and not awaits_metric
        # The clocks of the processes differ, but writing is something they do together.
        if not trainer.strategy.broadcast(due):
            return
        # What is repeated is logged again, what is not must be there.
        for logger in trainer.loggers:
            logger.save()
        others = trainer.strategy.checkpoint_io
        trainer.strategy.checkpoint_io = _AtomicFiles()
        try:
            trainer.save_checkpoint(self._folder.state_file)
        finally:
            trainer.strategy.checkpoint_io = others
        self._last = time.monotonic()

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        cost = asdict(self._meter.read())
        checkpoint[_ENTRY] = {"task": self._task, "trained": False, "cost": cost}


class _AtomicFiles(TorchCheckpointIO):
    """Write as we do: Lightning goes through memory and a file elsewhere, which a kill leaves."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        save_state(path, checkpoint)


def _ends(trainer: L.Trainer) -> bool:
    """Whether the epoch that is ending is the last one."""
    epochs = trainer.max_epochs
    return (
        trainer.should_stop
        or (epochs not in (None, -1) and trainer.current_epoch + 1 >= (epochs or 0))
        or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)
    )


def describe(stream: TaskStream, seed: int | None, evaluate: bool) -> dict[str, Any]:
    """What must be the same for a stream to resume, as plain values."""
    number = len(stream.tasks)
    found: dict[str, Any] = {"seed": seed, "evaluate": evaluate, "number of tasks": number}
    for task in stream.tasks:
        found |= {
            f"name of task {task.index}": task.name,
            f"classes of task {task.index}": list(task.class_names),
            f"number of training images of task {task.index}": len(task.train),
            f"number of test images of task {task.index}": len(task.test),
        }
    return found


def get_row(model: L.LightningModule, stream: TaskStream) -> Row | None:
    """The row of the current task in a module's accuracy matrix; None if it has none."""
    matrix = getattr(model, "accuracy", None)
    row = matrix.rows.get(stream.row) if isinstance(matrix, AccuracyMatrix) else None
    return None if row is None else row.tolist()


def put_row(model: L.LightningModule, stream: TaskStream, row: Row | None) -> None:
    """Put the row of the current task into the accuracy matrix, made if none is of its tasks."""
    if row is None:
        return
    matrix = getattr(model, "accuracy", None)
    classes = [sorted(task.classes) for task in stream.test_tasks]
    if not isinstance(matrix, AccuracyMatrix) or matrix.task_classes != classes:
        model.accuracy = matrix = AccuracyMatrix(classes, len(stream.class_names))
    matrix.rows[stream.row] = torch.tensor(row)


def _short(value: object) -> str:
    text = listing(value, 8) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else text[:117] + "..."
