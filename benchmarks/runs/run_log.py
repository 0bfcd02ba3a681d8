"""What a run logs: its names, one axis of steps for each training, and every value once."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from cl_merge.benchmarks.datasets.epochs import task_epochs
from cl_merge.benchmarks.methods.method import TRAININGS, Training
from cl_merge.benchmarks.runs.loggers import About, Row, check_loggers, open_books
from cl_merge.benchmarks.runs.run import Run
from cl_merge.benchmarks.runs.settings import flat
from cl_merge.data.tasks import Task
from cl_merge.training.journal import Journal, is_first_process
from cl_merge.training.metrics import AccuracyMatrix

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that what was logged may wait: writing takes milliseconds, which a step may, too."""


@contextmanager
def open_log(run: Run) -> Iterator[RunLog]:
    """Open the log of a run, new or begun before.

    Args:
        run: A run that has been started.

    Yields:
        The log.

    Raises:
        InputError: If a logger is unknown, not installed or cannot be opened.

    Example::

        with open_log(run) as log:
            trainer = training_trainer(run, training, task, log)
    """
    wanted = check_loggers(run.config)
    found = RunLog(run, wanted if is_first_process() else {}, on=bool(wanted))
    try:
        yield found
    except BaseException:
        # What went wrong matters more than a logger that cannot be closed after it.
        with suppress(Exception):
            found.close("failed")
        raise
    found.close("success")


class RunLog:
    """The log of a run.

    What is logged goes into a journal in the run's folder, and from there to the loggers. A run
    that was stopped repeats some of its steps, which are not logged again; what a logger lacks
    because a process died between the two, or because it is new, it gets when the log is opened.

    Args:
        run: The run.
        wanted: The loggers with their options.
        on: Whether anything is logged, here or by another process.

    Attributes:
        on: The same.
    """

    def __init__(self, run: Run, wanted: Mapping[str, Mapping[str, Any]], *, on: bool) -> None:
        self.on = on
        self._run = run
        place = run.folder.path / "logs"
        self._journal = Journal(place / "journal.jsonl")
        rows: list[Row] = [(s, m) for r in self._journal.records for s, m in r.get("rows", ())]
        self._last = {name: step for step, metrics in rows for name in metrics}
        self._waiting: list[Row] = []
        self._written = time.monotonic()
        about = About(_title(run), _settings(run), f"eval/{_word(run.own.name)}/accuracy")
        self._books = open_books(wanted, place, about, rows)

    def of_task(self, training: Training, task: Task) -> tuple[Logger, list[Callback]]:
        """What the trainer of a task logs with.

        Args:
            training: Which training.
            task: The task.

        Returns:
            The logger, and callbacks that belong to it.
        """
        begin = sum(self._steps(training, index) for index in range(task.index))
        logger = _TaskLogger(self, training, task, begin)
        return logger, [LearningRateMonitor("step"), _Counting(self, training, task)]

    def evaluation(self, method: str, row: int) -> None:
        """Log what a row of a method's accuracy matrix says, unless it is logged.

        Args:
            method: Its name.
            row: Index of the row, which the matrix has.
        """
        begin, step = f"eval/{_word(method)}", self._step_of(method, row)
        if not self.on or step <= self._last.get(f"{begin}/accuracy", -1):
            return
        found = _metrics(self._run, method, row)
        self.add(step, {f"{begin}/{name}": value for name, value in found.items()})
        self.write()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log values, except those that are logged.

        Args:
            step: On the axis of the training that they belong to.
            metrics: The values by name.
        """
        new = {name: v for name, v in metrics.items() if step > self._last.get(name, -1)}
        if not new:
            return
        self._last |= dict.fromkeys(new, step)
        if self._waiting and self._waiting[-1][0] == step:
            self._waiting[-1][1].update(new)
        else:
            self._waiting.append((step, new))

    def write(self) -> None:
        """Write what waits, to the journal and then to the loggers.

        Raises:
            StorageError: If the journal cannot be written.
        """
        rows, self._waiting = self._waiting, []
        self._written = time.monotonic()
        if not rows:
            return
        self._journal.append({"rows": rows})
        for book in list(self._books):
            try:
                book.write(rows)
            # A server that is gone must not cost a training; what is missed is in the journal.
            except Exception as error:
                self._books.remove(book)
                log.warning(
                    "logger %s failed (%s) and gets nothing more; when the run goes on it gets "
                    "what it missed",
                    type(book.logger).__name__,
                    " ".join(str(error).split()) or type(error).__name__,
                )

    def write_in_time(self) -> None:
        """Write what waits, if the last time is long enough ago."""
        if time.monotonic() - self._written >= PATIENCE:
            self.write()

    def note_steps(self, training: Training, task: Task, steps: int) -> None:
        """Note how many steps the training of a task took.

        Args:
            training: Which training.
            task: The task.
            steps: Steps of the optimizer.
        """
        self.write()
        self._journal.append({"training": training.name, "task": task.index, "steps": steps})

    def close(self, status: str) -> None:
        """Write what waits, and tell the loggers that nothing follows.

        Args:
            status: ``"success"`` or ``"failed"``.
        """
        try:
            self.write()
        finally:
            for book in self._books:
                book.close(status)

    def _step_of(self, method: str, row: int) -> int:
        for name, methods in self._run.trainings.items():
            if method in [each.name for each in methods]:
                training = TRAININGS[name]
                tasks = 1 if training.joint else row + 1
                return sum(self._steps(training, index) for index in range(tasks))
        return 0  # zero-shot

    def _steps(self, training: Training, index: int) -> int:
        """Steps of a task: as noted, else as many as the settings ask for."""
        noted = self._journal.find(training=training.name, task=index)
        return int(noted["steps"]) if noted else _planned_steps(self._run, training, index)


class _TaskLogger(Logger):
    """What a task's trainer sees of the log of a run."""

    def __init__(self, run_log: RunLog, training: Training, task: Task, begin: int) -> None:
        super().__init__()
        self._log, self._task, self._begin = run_log, task.index, begin
        self._place = f"train/{training.name}"

    @property
    @override
    def name(self) -> str:
        return "cl_merge"

    @property
    @override
    def version(self) -> str:
        return self._place

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        found = {f"{self._place}/{_name(name)}": value for name, value in metrics.items()}
        self._log.add(self._begin + (step or 0), found | {f"{self._place}/task": self._task})

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Those of the model are among those of the run, which are logged once."""

    @override
    def save(self) -> None:
        self._log.write_in_time()


class _Counting(Callback):
    """Write the log where a run may go on from, and note the steps of a task."""

    def __init__(self, run_log: RunLog, training: Training, task: Task) -> None:
        self._log, self._training, self._task = run_log, training, task

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # What is repeated is logged again, what is not must be there.
        self._log.write()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log.note_steps(self._training, self._task, trainer.global_step)


def _name(name: str) -> str:
    """What is called ``name`` by the module, its callbacks and Lightning is called here."""
    rate = re.fullmatch(r"lr-\w+?(?:/pg(\d+))?", name)
    if rate is None:
        return name
    return f"lr/group_{int(rate[1]):02d}" if rate[1] else "lr"


def _word(method: str) -> str:
    """The name of a method as all loggers take it: that of one's own may be any text."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", method)


def _metrics(run: Run, method: str, row: int) -> dict[str, float]:
    """What a method's matrix says after a task: as of a stream that ends there, and by task."""
    counts = run.matrices[method].rows[row]
    # The pre-trained model has seen no task; it is what all of them are compared with.
    seen = len(run.stream.tasks) if method == "zero-shot" else row + 1
    found = {}
    if counts[2, :seen].sum():
        before = _part(run, "zero-shot", [0], seen)
        rows = [at for at in sorted(run.matrices[method].rows) if at <= row]
        found = _part(run, method, rows, seen).metrics(before)
    width = max(len(str(len(run.stream.tasks) - 1)), 2)
    for task, (correct, aware, total) in enumerate(counts.T.tolist()):
        if total:
            found[f"task_{task:0{width}d}/accuracy"] = 100.0 * correct / total
            found[f"task_{task:0{width}d}/task_aware_accuracy"] = 100.0 * aware / total
    return {name: value for name, value in found.items() if isfinite(value)}


def _part(run: Run, method: str, rows: list[int], tasks: int) -> AccuracyMatrix:
    classes = [task.classes for task in run.stream.tasks[:tasks]]
    matrix = AccuracyMatrix(classes, len(run.stream.class_names))
    matrix.rows = {row: run.matrices[method].rows[row][:, :tasks] for row in rows}
    return matrix


def _planned_steps(run: Run, training: Training, index: int) -> int:
    """Steps of a task that was trained before steps were noted, if nothing cut it short."""
    tasks = run.stream.tasks if training.joint else run.stream.tasks[index : index + 1]
    epochs = (
        run.config.trainer.get("max_epochs")
        if training.joint
        else task_epochs(run.config, len(run.stream.tasks))[index]
    )
    batches = -(-sum(len(task.train) for task in tasks) // run.stream.batch_size)
    return -(-batches // int(run.config.trainer.get("accumulate_grad_batches", 1))) * (epochs or 1)


def _title(run: Run) -> str:
    data, method = Path(run.config.data).stem, _word(run.own.name)
    return f"{data}-{len(run.stream.tasks)}-{method}-seed{run.config.seed}"


def _settings(run: Run) -> dict[str, Any]:
    """The settings by the names that they have on the command line."""
    # Where it logs to is no setting of what is logged, and may name a server with a password.
    tree = {key: value for key, value in asdict(run.config).items() if key != "loggers"}
    return flat(tree)
