"""What a run logs: its names, and one axis of steps for each training."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import isfinite
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, LambdaCallback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from cl_merge.benchmarks.formatting import data_label
from cl_merge.benchmarks.methods.method import TRAININGS, Method, Training
from cl_merge.benchmarks.runs.loggers import RunInfo, check_loggers, close_logger, open_loggers
from cl_merge.benchmarks.runs.run import Run
from cl_merge.config.reading import flat
from cl_merge.data.tasks import Task
from cl_merge.errors import was_interrupted
from cl_merge.training.journal import Journal, is_first_process
from cl_merge.training.metrics import AccuracyMatrix

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that what was logged may wait: writing takes milliseconds, which a step may, too."""


@contextmanager
def open_log(run: Run) -> Iterator[RunLog]:
    """Open the log of a run, new or begun before."""
    wanted = check_loggers(run.config)
    title = f"{data_label(run.config.data)}-{len(run.stream.tasks)}-{_word(run.own.name)}"
    # Where it logs to is no setting of what is logged, and may name a server with a password.
    settings = {key: value for key, value in asdict(run.config).items() if key != "loggers"}
    info = RunInfo(f"{title}-seed{run.config.seed}", flat(settings), run.folder.path / "logs")
    loggers = open_loggers(wanted if is_first_process() else {}, info)
    found = RunLog(run, loggers, on=bool(wanted))
    try:
        yield found
    except BaseException:
        # What went wrong matters more than a logger that cannot be closed after it.
        with suppress(Exception):
            found.close("failed")
        raise
    found.close("success")


class RunLog(Logger):
    """The log of a run, and the logger of each of its trainers.

    It passes on what it is given to the run's loggers, at a step of the training that it belongs
    to: the steps of each task stand in ``logs/journal.jsonl``. `on` says whether anything is
    logged, by the loggers of this process or by another one.
    """

    def __init__(self, run: Run, loggers: list[Logger], *, on: bool) -> None:
        super().__init__()
        self._run, self._loggers, self._on = run, loggers, on
        self._journal = Journal(run.folder.path / "logs" / "journal.jsonl")
        self._saved = time.monotonic()
        self._prefix, self._task, self._begin = "", 0, 0  # of the task that trains

    def of_task(
        self, training: Training, task: Task
    ) -> tuple[Logger | Literal[False], list[Callback]]:
        """The logger of a task's trainer, and callbacks that belong to it."""
        if not self._on:
            return False, []
        self._prefix, self._task = f"train/{training.name}", task.index
        self._begin = self._steps(training.name, task.index)

        def note_steps(trainer: L.Trainer, module: L.LightningModule) -> None:
            self._write()
            record = {"training": training.name, "task": task.index, "steps": trainer.global_step}
            self._journal.append(record)

        # What is repeated from a checkpoint is logged again, what is not must be there.
        saving = LambdaCallback(
            on_save_checkpoint=lambda *_: self._write(), on_train_end=note_steps
        )
        return self, [LearningRateMonitor("step"), saving]

    def evaluation(self, method: Method, row: int) -> None:
        """Log what a row of a method's accuracy matrix says, which the matrix has."""
        if not self._on:
            return
        training = method.training
        joint = training is not None and TRAININGS[training].joint
        step = self._steps(training, 1 if joint else row + 1) if training is not None else 0
        found = _metrics(self._run, method.name, row)
        self._add(step, {f"eval/{_word(method.name)}/{name}": found[name] for name in found})
        self._write()

    def close(self, status: str) -> None:
        """Write what waits, and tell the loggers that nothing follows."""
        self._write()
        for logger in self._loggers:
            close_logger(logger, status)

    # What a trainer calls.

    @property
    @override
    def name(self) -> str:
        return "cl_merge"

    @property
    @override
    def version(self) -> str:
        return self._prefix

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        found = {f"{self._prefix}/{_name(name)}": value for name, value in metrics.items()}
        if "epoch" in metrics:  # what the module logs; rates come by themselves, for the same step
            found[f"{self._prefix}/task"] = self._task
        self._add(self._begin + (step or 0), found)

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Those of the model are among those of the run, which are logged once."""

    @override
    def save(self) -> None:
        if time.monotonic() - self._saved >= PATIENCE:
            self._write()

    def _add(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda logger: logger.log_metrics(metrics, step))

    def _write(self) -> None:
        self._each(lambda logger: logger.save())
        self._saved = time.monotonic()

    def _each(self, work: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                work(logger)
            # A server that is gone must not cost a training.
            except Exception as error:
                if was_interrupted(error):
                    raise
                self._loggers.remove(logger)
                log.warning(
                    "logger %s failed (%s) and gets nothing more until the run goes on",
                    type(logger).__name__,
                    " ".join(str(error).split()) or type(error).__name__,
                )

    def _steps(self, training: str, tasks: int) -> int:
        """Steps of the first tasks of a training."""
        found = [self._journal.find(training=training, task=task) for task in range(tasks)]
        return sum(int(record["steps"]) for record in found if record is not None)


def _name(name: str) -> str:
    """What the log calls a value that the module, its callbacks or Lightning log."""
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
        found = _part(run, method, row, seen).metrics(_part(run, "zero-shot", 0, seen))
    width = max(len(str(len(run.stream.tasks) - 1)), 2)
    for task, (correct, aware, total) in enumerate(counts.T.tolist()):
        if total:
            found[f"task_{task:0{width}d}/accuracy"] = 100.0 * correct / total
            found[f"task_{task:0{width}d}/task_aware_accuracy"] = 100.0 * aware / total
    return {name: value for name, value in found.items() if isfinite(value)}


def _part(run: Run, method: str, last: int, tasks: int) -> AccuracyMatrix:
    """The first columns of a method's matrix, down to a row."""
    classes = [task.classes for task in run.stream.tasks[:tasks]]
    matrix, rows = AccuracyMatrix(classes, len(run.stream.class_names)), run.matrices[method].rows
    matrix.rows = {row: rows[row][:, :tasks] for row in sorted(rows) if row <= last}
    return matrix
