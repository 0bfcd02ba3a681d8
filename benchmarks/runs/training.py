"""What a run does: each training once, and after each task every method that shares it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from cl_merge.benchmarks.datasets.loading import task_epochs
from cl_merge.benchmarks.methods.method import METHODS, TRAININGS, Training
from cl_merge.benchmarks.runs.evaluation import Evaluation
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run, make_regularizer
from cl_merge.benchmarks.runs.run_log import RunLog, open_log
from cl_merge.callbacks.fisher import TaskFisher
from cl_merge.data.task_stream import TaskStream
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError, listing, task_name
from cl_merge.storage.files import save_tensors
from cl_merge.task_vectors.module_weights import floating_buffers, install, trained_parameters
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import TaskVector
from cl_merge.training.cost import Cost, Meter
from cl_merge.training.fit import TaskEnd, fit_stream
from cl_merge.training.journal import is_first_process

log = logging.getLogger(__name__)

Tell = Callable[[Run, Training, TaskEnd], None]
"""Called after each task of each training."""


def run_stream(run: Run, progress: RunProgress, tell: Tell | None = None) -> None:
    """Train and evaluate everything that a run needs and has not done yet."""
    meter = Meter(Cost(seconds=run.folder.seconds_before))
    with open_log(run) as log:
        zero_shot = METHODS["zero-shot"]
        Evaluation(run, [zero_shot], progress, log).evaluate(zero_shot, 0)
        rows = run.matrices["zero-shot"].rows
        # Nothing trains: every row of the matrix is the same.
        rows |= {task.index: rows[0].clone() for task in run.stream.tasks}
        for name, methods in run.trainings.items():
            _train(run, TRAININGS[name], Evaluation(run, methods, progress, log), tell)
        run.cost = meter.read()


def _train(run: Run, training: Training, evaluation: Evaluation, tell: Tell | None) -> None:
    """Train the stream once, storing what each task changed; evaluate what shares the training."""
    stream, methods, progress = evaluation.stream, evaluation.methods, evaluation.progress
    for task in run.folder.finished_tasks(training.name, len(stream.tasks)):
        evaluation.after_task(task)
    if (costs := run.folder.finished_training(training.name)) is not None:
        run.costs[training.name] = costs
        return
    _reset(run)

    def make_trainer(task: Task) -> L.Trainer:
        if training.start == "independent":
            _reset(run)
        progress.describe(f"task {task.index + 1}/{len(stream.tasks)}, {training.name}")
        return training_trainer(run, training, task, evaluation.log)

    def after_task(end: TaskEnd) -> None:
        evaluation.after_task(end.task.index)
        if tell is not None:
            tell(run, training, end)

    name = training.regularizer
    regularizers = [make_regularizer(run.config, name)] if name is not None else []
    store = StoreTask(run, stream, training.name, weigh=any(m.weighted for m in methods))
    found = fit_stream(
        run.model,
        stream,
        callbacks=[*regularizers, store, progress],
        trainer=make_trainer,
        evaluate=False,
        seed=run.config.seed,
        on_task_end=after_task,
        directory=run.folder.state_of(training.name),
        checkpoint_seconds=run.config.checkpoint_seconds,
    )
    run.costs[training.name] = found.costs
    if run.own in methods:
        _save_model(run, evaluation)


def training_trainer(
    run: Run, training: Training, task: Task, log: RunLog | None = None
) -> L.Trainer:
    """Make the trainer of a task, which logs to the log and keeps no checkpoints of its own."""
    logger, callbacks = log.of_task(training, task) if log is not None else (False, [])
    defaults: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        "callbacks": callbacks,
        "default_root_dir": str(run.folder.path),
    }
    given = dict(run.config.trainer)
    if not training.joint:
        given["max_epochs"] = task_epochs(run.config, len(run.stream.tasks))[task.index]
    # `trainer.logger` has been read with the loggers of the run.
    return L.Trainer(**defaults | given | {"logger": logger, "enable_progress_bar": False})


class StoreTask(Callback):
    """Write into a run's folder what a task changed: all that is needed to evaluate it later.

    ``task<n>.safetensors`` is the task vector. ``unmerged<n>.safetensors`` holds what else moved,
    as it is after the task: floating-point buffers, and parameters that ``merge.include`` and
    ``merge.exclude`` leave out; it is there only if something moved.
    ``importance<n>.safetensors`` says how much each element matters; `weigh` asks for it.
    """

    def __init__(self, run: Run, stream: TaskStream, training: str, *, weigh: bool) -> None:
        self._run, self._stream, self._weigh = run, stream, weigh
        self._folder = run.folder.task_vectors(training)
        merge = run.config.merge
        self._merged = set(Selection(merge.include, merge.exclude).names(run.base))
        self._told = merge.buffers is not None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run, task = self._run, self._stream.task.index
        live = trained_parameters(pl_module)
        try:
            vector = TaskVector.between(
                {name: value for name, value in run.base.items() if name in self._merged},
                {name: value for name, value in live.items() if name in self._merged},
            )
        except InputError as error:
            raise InputError(f"{task_name(task)}: {error}") from error
        tensors = {"unmerged": self._unmerged(pl_module)}
        if self._weigh:
            fisher = TaskFisher("MergeCallback", samples=run.config.merge.importance_samples)
            merged = {name: live[name] for name in vector}
            found = fisher.of(trainer, pl_module, merged, seed=(task, 0))
            tensors["importance"] = {name: found[name].cpu() for name in vector}
        if trainer.is_global_zero:
            for name, values in tensors.items():
                if values:
                    save_tensors(self._folder / f"{name}{task}.safetensors", values, {})
            # Last: a task that has it is taken to have the others.
            vector.save(self._folder / f"task{task}.safetensors", run.config.merge.store)
        trainer.strategy.barrier()  # the others read what the first process has written

    def _unmerged(self, module: L.LightningModule) -> dict[str, Tensor]:
        base, buffers = self._run.base, self._run.buffers
        before = {name: value for name, value in base.items() if name not in self._merged} | buffers
        live = trained_parameters(module) | floating_buffers(module)
        after = {name: live[name].detach().cpu() for name in before}
        moved = {n: value for n, value in after.items() if not torch.equal(value, before[n])}
        names = [name for name in moved if name in buffers]
        if names and not self._told:
            log.warning(
                f"{len(names)} floating-point buffers moved during training and are not merged: "
                f"{listing(names)}. Methods that merge are evaluated with those of the last task; "
                "choose with merge.buffers=trained, base or average"
            )
            self._told = True
        return moved


def _reset(run: Run) -> None:
    """Put the pre-trained weights and buffers back into the model."""
    install(trained_parameters(run.model), run.base)
    install(floating_buffers(run.model), run.buffers)


def _save_model(run: Run, evaluation: Evaluation) -> None:
    """Write the whole classifier with the weights of the run's method, which stay in the model."""
    evaluation.install(run.own)
    scale = run.scale(run.own)
    metadata = {
        "format": "cl_merge.model",
        "model": run.config.model,
        "method": run.config.method,
        "scale": str(scale.plain() if scale else None),
    }
    if is_first_process():
        file = run.folder.path / "merged.safetensors"
        save_tensors(file, run.model.state_dict(), metadata)
