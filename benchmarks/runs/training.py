"""What a run does: each training once, and after each task every method that shares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L

from cl_merge.benchmarks.methods.method import TRAININGS, Method, Training
from cl_merge.benchmarks.runs.evaluation import fill_row
from cl_merge.benchmarks.runs.latecomers import evaluate_latecomers
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run, make_merger, make_regularizer, merge_callback
from cl_merge.benchmarks.runs.run_log import RunLog, open_log
from cl_merge.benchmarks.runs.statistics import learn_task, statistics_of
from cl_merge.benchmarks.runs.trainers import training_trainer
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.data.tasks import Task
from cl_merge.mergers import Merger
from cl_merge.task_vectors.module_weights import install, trained_parameters
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.task_vector import TaskVector
from cl_merge.training.cost import measured
from cl_merge.training.fit import TaskEnd, fit_stream

Tell = Callable[[Run, Training, TaskEnd], None]
"""Called after each task of each training."""


def run_stream(run: Run, progress: RunProgress, tell: Tell | None = None) -> None:
    """Train and evaluate everything that a run needs and has not done yet.

    Args:
        run: A run that has been started.
        progress: Shows how far it is.
        tell: Called after each task of each training.

    Raises:
        InputError: If something that the run logs to is unknown, not installed or cannot be opened.
    """
    with open_log(run) as log, measured() as run.cost:
        _evaluate_zero_shot(run, progress)
        log.evaluation("zero-shot", 0)
        for name, methods in run.trainings.items():
            _train(run, TRAININGS[name], methods, progress, log, tell)
    run.cost.seconds += run.folder.seconds_before


def _evaluate_zero_shot(run: Run, progress: RunProgress) -> None:
    progress.describe("zero-shot")
    run.stream.select(0)
    matrix = run.new_matrix("zero-shot")
    fill_row(run, run.stream, "zero-shot", progress)
    # Nothing trains: every row of the matrix is the same.
    for task in run.stream.tasks:
        matrix.rows[task.index] = matrix.rows[0].clone()


def _train(
    run: Run,
    training: Training,
    methods: list[Method],
    progress: RunProgress,
    log: RunLog,
    tell: Tell | None,
) -> None:
    """Train the stream once; evaluate after each task every method that shares this training."""
    install(trained_parameters(run.model), run.base)
    own = next((method for method in methods if method == run.own), None)
    # Methods that differ in what classifies share a merger.
    merging = list(dict.fromkeys(method.plain for method in methods if method.merger))
    # The callback merges with one method as it trains; the others fold the same task vectors here.
    lead = own.plain if own and own.plain in merging else next(iter(merging), None)
    callback = merge_callback(
        run.config,
        lead,
        start=training.start,
        directory=run.folder.task_vectors(training.name),
    )
    mergers: dict[str, Merger] = {}
    for method in merging:
        if method != lead:
            merger, scale = make_merger(run.config, method)
            mergers[method.name] = merger
            run.scales[method.name] = Scales.read(scale, merger.published_scale)
    for method in methods:
        run.new_matrix(method.name)

    def note_scales() -> None:
        if lead is not None:
            run.scales[lead.name] = callback.scales
            run.chosen |= {lead.name: callback.chosen} if callback.chosen else {}
        run.scales |= {m.name: run.scales[m.plain.name] for m in methods if m.merger}

    stream = run.stream.joint() if training.joint else run.stream
    statistics = statistics_of(run, stream, methods, progress)
    note_scales()
    evaluate_latecomers(run, stream, training, methods, statistics, progress)
    for method in methods:
        for row in sorted(run.matrices[method.name].rows):
            log.evaluation(method.name, row)
    if (costs := run.folder.finished_training(training.name)) is not None:
        run.costs[training.name] = costs
        return
    rows = run.rows(training.name)

    def make_trainer(task: Task) -> L.Trainer:
        progress.describe(f"{_place(run, task.index)}, {training.name}")
        return training_trainer(run, training, task, log)

    def after_task(end: TaskEnd) -> None:
        if mergers:
            vector = callback.task_vector(run.model)
            for merger in mergers.values():
                _catch_up(merger, run.folder.task_vectors(training.name), end.task.index, vector)
                merger.update(vector)
        note_scales()
        if lead is not None and callback.chosen:
            run.folder.add_chosen_scale(lead.name, end.task.index, callback.chosen[-1].plain())
        for method in methods:
            merging = callback if method.plain == lead else mergers.get(method.plain.name)
            voting = statistics.get(method.name)
            place = _place(run, end.task.index)
            if voting is not None:
                progress.describe(f"{place}, statistics of {method.name}")
                learn_task(run, stream, method.name, voting, merging)
            if end.task.index in rows:
                progress.describe(f"{place}, evaluating {method.name}", method.encoders)
                fill_row(run, stream, method.name, progress, merging, voting)
                log.evaluation(method.name, stream.row)
        if tell is not None:
            tell(run, training, end)

    found = fit_stream(
        run.model,
        stream,
        callbacks=[*_regularizers(run, training), callback, progress],
        trainer=make_trainer,
        evaluate=False,
        seed=run.config.seed,
        on_task_end=after_task,
        directory=run.folder.state_of(training.name),
        checkpoint_seconds=run.config.checkpoint_seconds,
    )
    run.costs[training.name] = found.costs
    note_scales()
    if own is not None:
        _save_model(run, callback if own.plain == lead else None, statistics.get(own.name))


def _regularizers(run: Run, training: Training) -> list[L.Callback]:
    return [make_regularizer(run.config, training.regularizer)] if training.regularizer else []


def _catch_up(merger: Merger, folder: Path, tasks: int, like: TaskVector) -> None:
    """Fold what a run that was stopped had folded: the task vectors it has written."""
    device = next(iter(like.values())).device
    for index in range(merger.tasks, tasks):
        vector = TaskVector.load(folder / f"task{index}.safetensors")
        merger.update({name: tensor.to(device) for name, tensor in vector.items()})


def _place(run: Run, position: int) -> str:
    return f"task {position + 1}/{len(run.stream.tasks)}"


def _save_model(
    run: Run, callback: MergeCallback | None, statistics: ClassStatistics | None
) -> None:
    """Write the whole classifier with the weights of the run's method, which stay in the model."""
    if callback is not None:
        callback.install(run.model)
    elif statistics is not None:  # of the pre-trained model
        install(trained_parameters(run.model), run.base)
    if statistics is not None and statistics.kind == "aligned":
        statistics.install(run.model)
    scales = run.scales.get(run.own.name)
    metadata = {
        "format": "cl_merge.model",
        "model": run.config.model,
        "method": run.config.method,
        "scale": str(scales.plain() if scales else None),
    }
    run.folder.write_tensors("merged.safetensors", run.model.state_dict(), metadata)
