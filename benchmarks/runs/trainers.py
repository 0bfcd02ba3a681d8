"""The trainers of a run: one for each task, one for each evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from cl_merge.benchmarks.datasets.loading import task_epochs
from cl_merge.benchmarks.methods.method import Training
from cl_merge.benchmarks.runs.run import Run
from cl_merge.benchmarks.runs.run_log import RunLog
from cl_merge.data.tasks import Task

# What of the trainer's arguments also holds for evaluations outside a fit.
_WHERE_IT_RUNS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "deterministic",
    "limit_test_batches",
)


def training_trainer(
    run: Run, training: Training, task: Task, log: RunLog | None = None
) -> L.Trainer:
    """Make the trainer of a task, which logs to the log and keeps no checkpoints of its own."""
    logger, callbacks = log.of_task(training, task) if log and log.on else (False, [])
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


def evaluation_trainer(
    settings: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> L.Trainer:
    """Make a trainer that only evaluates, where and how precisely the training's settings say."""
    return L.Trainer(
        **{key: value for key, value in settings.items() if key in _WHERE_IT_RUNS},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
