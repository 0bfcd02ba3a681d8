"""Class statistics of a run's methods: learned after each task, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from cl_merge.benchmarks.methods.method import LEARNING_COST, Method
from cl_merge.benchmarks.runs.evaluation import weights_of
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run
from cl_merge.benchmarks.runs.trainers import evaluation_trainer
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.class_statistics import StreamStatistics
from cl_merge.data.task_stream import TaskStream
from cl_merge.mergers import Merger
from cl_merge.training.journal import is_first_process


def statistics_of(
    run: Run, stream: TaskStream, methods: list[Method], progress: RunProgress
) -> dict[str, ClassStatistics]:
    """Make the class statistics of those methods that have them, with what the folder holds.

    Args:
        run: The run.
        stream: Its tasks.
        methods: Any methods.
        progress: Shows how far the run is.

    Returns:
        By the method's name.
    """

    def images() -> Iterator[Any]:
        return progress.counted(stream.task_dataloader(), LEARNING_COST)

    found = {}
    for method in methods:
        if method.statistics is not None:
            made = ClassStatistics(method.statistics, text=method.text, images=images)
            if method.merger is not None:  # otherwise the model holds the pre-trained weights
                made.base, made.base_buffers = run.base, run.buffers
            file = run.folder.statistics(method.name)
            made.statistics = StreamStatistics.load(file) if file.exists() else None
            found[method.name] = made
    return found


def learn_task(
    run: Run,
    stream: TaskStream,
    name: str,
    statistics: ClassStatistics,
    merging: MergeCallback | Merger | None,
) -> None:
    """Take up the current task's images, unless they are in, and write the statistics down.

    Args:
        run: The run.
        stream: Its tasks, at the one that was learned last.
        name: The method.
        statistics: Its statistics.
        merging: What merges, with that task in it; None for the pre-trained weights.
    """
    if statistics.tasks > stream.task.index:
        return
    with weights_of(run, name, merging, statistics) as callbacks:
        learning = _Learning(stream, statistics)
        evaluation_trainer(run.config.trainer, [*callbacks, learning]).predict(
            run.model, _NoBatches(), return_predictions=False
        )
    kept = statistics.statistics
    if kept is not None and is_first_process():
        kept.save(run.folder.statistics(name), {"method": name, "model": run.config.model})


class _Learning(Callback):
    """Learn a task where a trainer's strategy is at hand, and what merges has put its weights."""

    def __init__(self, stream: TaskStream, statistics: ClassStatistics) -> None:
        self._stream = stream
        self._statistics = statistics

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stream.trainer = trainer  # how many processes share the images
        # What is kept outlives the inference mode of this evaluation.
        with torch.inference_mode(False):
            self._statistics.learn(trainer, pl_module)


class _NoBatches:
    """Nothing to predict, of a length that is not known before: the hooks fire all the same."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())
