"""Training a stream: one fit per task, an evaluation after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from typing_extensions import override

from cl_merge.data.task_stream import TaskStream
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError, listing, task_name
from cl_merge.seeds import derive_seed
from cl_merge.training.cost import Cost, Meter
from cl_merge.training.journal import only_process
from cl_merge.training.metrics import AccuracyMatrix
from cl_merge.training.resume import KeepCheckpoints, StreamFolder, describe, get_row, put_row


@dataclass
class TaskEnd:
    """What is at hand when a task has been trained and evaluated.

    Attributes:
        task: The task.
        trainer: The task's trainer; use it for more evaluations of the same model.
        model: The model, with the weights that training left.
        cost: What the training took.
        metrics: What the evaluation logged.
    """

    task: Task
    trainer: L.Trainer
    model: L.LightningModule
    cost: Cost
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class StreamResult:
    """What a stream left.

    Attributes:
        accuracy: The accuracy matrix, if the module counts into one, as `CLIPClassifier` does.
        tasks: For each task what its evaluation logged.
        costs: For each task what its training took.
    """

    accuracy: AccuracyMatrix | None = None
    tasks: list[dict[str, float]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)


def fit_stream(
    model: L.LightningModule,
    stream: TaskStream,
    *,
    callbacks: Sequence[Callback] = (),
    trainer: Mapping[str, Any] | Callable[[Task], L.Trainer] | None = None,
    evaluate: bool = True,
    seed: int | None = None,
    on_task_end: Callable[[TaskEnd], None] | None = None,
    directory: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> StreamResult:
    """Train a model on every task of a stream, one after another.

    Every task gets a new `Trainer`: optimizers, schedules and step counts start afresh. Callbacks
    that live through the stream, such as `MergeCallback`, go into `callbacks`; those that must be
    new for every task, such as `ModelCheckpoint` or `EarlyStopping`, are built by a function given
    as `trainer`.

    With a `directory`, a stream that was stopped at any instant resumes when this is called again
    in the same way, with the model as it was before the first task: finished tasks are skipped, and
    a task in progress resumes at the end of an epoch, at the latest that before its last; with a
    schedule that waits for a plateau it starts anew. With a seed, and on a CPU, weights, merged
    weights and metrics are those of a stream that was not interrupted, bit for bit. Under DDP every
    process is given the same `directory`; the first one writes to it.

    Args:
        model: What learns.
        stream: The tasks.
        callbacks: Callbacks that see every task, in this order, after the trainer's own.
        trainer: Arguments of each `Trainer`, or a function of the task that makes a new one.
        evaluate: Test on all tasks after each task.
        seed: Seeds every epoch from (seed, task, epoch), every evaluation and every `on_task_end`
            likewise, so that their random numbers do not depend on what ran before. None leaves the
            generators alone.
        on_task_end: Called after each task's evaluation. If it did not return, it is called again
            when the stream resumes; the evaluation is not repeated.
        directory: Where to keep ``journal.jsonl`` and ``state.ckpt``, to resume; None for nowhere.
        checkpoint_seconds: The least time between two checkpoints within a task, which are written
            at the ends of its epochs but the last; 0 writes one after each.

    Returns:
        Accuracy matrix, logged metrics and costs, those of earlier processes among them.

    Raises:
        InputError: If a trainer has trained another task, has one of the callbacks too, or starts
            processes of its own, as with ``ddp_spawn``; if the directory was made for another
            stream or model, is in use by another process, or its files do not fit together; if
            hyper-parameters or states of callbacks are not tensors and plain values.
        StorageError: If the directory cannot be written; nothing that was in it is lost.

    Example::

        merge = MergeCallback("magmax")
        result = fit_stream(model, stream, callbacks=[merge], trainer={"max_epochs": 3}, seed=0,
                            directory="stream")
        print(result.accuracy.metrics()["accuracy"])
    """
    result = StreamResult()
    directory = None if directory is None else Path(directory).expanduser()
    with nullcontext() if directory is None else only_process(directory):
        folder = None
        if directory is not None:
            folder = StreamFolder(directory)
            folder.check(describe(stream, seed, evaluate))
            folder.restore(model, callbacks)
        for task in stream.tasks:
            stream.select(task.index)
            done = folder.journal.find(done="task", task=task.index) if folder else None
            if done is not None:
                put_row(model, stream, done["row"])
                metrics, cost = done["metrics"], Cost(**done["cost"])
            else:
                _seed(seed, task.index, 0)
                runner = _trainer(trainer, task, seed, callbacks)
                cost = _train(runner, model, stream, callbacks, folder, checkpoint_seconds)
                end = TaskEnd(task, runner, model, cost)
                if evaluate:
                    _seed(seed, task.index, "evaluation")
                    end.metrics = _evaluate(runner, model, stream, folder)
                if on_task_end is not None:
                    _seed(seed, task.index, "end")
                    on_task_end(end)
                metrics = end.metrics
                if folder is not None:
                    row = get_row(model, stream) if evaluate else None
                    record = {"metrics": metrics, "cost": asdict(cost), "row": row}
                    folder.journal.append({"done": "task", "task": task.index} | record)
            result.tasks.append(metrics)
            result.costs.append(cost)
    found = getattr(model, "accuracy", None)
    result.accuracy = found if isinstance(found, AccuracyMatrix) else None
    return result


def _seed(seed: int | None, task: int, part: int | str) -> None:
    """Seed Python, NumPy and torch for an epoch, or another part, of a task of a stream."""
    if seed is None:
        return
    # Lightning accepts 32-bit seeds.
    L.seed_everything(derive_seed("epoch", seed, task, part) % 2**32, workers=True, verbose=False)


class _Seeding(Callback):
    """Seed every epoch by what it is, so that one that is repeated draws the same numbers."""

    def __init__(self, seed: int | None, task: int) -> None:
        self._seed = seed
        self._task = task

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _seed(self._seed, self._task, trainer.current_epoch)


def _train(
    runner: L.Trainer,
    model: L.LightningModule,
    stream: TaskStream,
    callbacks: Sequence[Callback],
    folder: StreamFolder | None,
    checkpoint_seconds: float,
) -> Cost:
    """Train the current task: all of it, the rest after a checkpoint, or nothing."""
    if folder is None:
        meter = Meter()
        runner.fit(model, datamodule=stream)
        return meter.read()
    task = stream.task.index
    trained = folder.cost(task, trained=True)
    if trained is not None:
        return trained
    before = folder.cost(task, trained=False)
    checkpoint = folder.state_file if before is not None else None
    meter = Meter(before)
    # Not among the trainer's arguments: it is no business of its `enable_checkpointing`.
    keep = KeepCheckpoints(folder, task, checkpoint_seconds, meter)
    runner.callbacks.append(keep)  # type: ignore[attr-defined]
    # Without code: the folder has read the checkpoint with `weights_only` before.
    runner.fit(model, datamodule=stream, ckpt_path=checkpoint)
    cost = meter.read()
    folder.save_trained(task, cost, model, callbacks)
    return cost


def _evaluate(
    runner: L.Trainer, model: L.LightningModule, stream: TaskStream, folder: StreamFolder | None
) -> dict[str, float]:
    """Test after the current task, or recall what a test found before."""
    evaluation = {"done": "evaluation", "task": stream.task.index}
    known = folder.journal.find(**evaluation) if folder else None
    if known is not None:
        put_row(model, stream, known["row"])
        return dict(known["metrics"])
    # Nothing is logged where the trainer is to test nothing.
    logged = runner.test(model, datamodule=stream, verbose=False) or [{}]
    metrics = {name: float(value) for name, value in logged[0].items()}
    if folder is not None:
        folder.journal.append(evaluation | {"metrics": metrics, "row": get_row(model, stream)})
    return metrics


def _trainer(
    given: Mapping[str, Any] | Callable[[Task], L.Trainer] | None,
    task: Task,
    seed: int | None,
    callbacks: Sequence[Callback],
) -> L.Trainer:
    seeding = _Seeding(seed, task.index)
    made: Any
    if given is None or isinstance(given, Mapping):
        arguments = dict(given or {})
        own = arguments.get("callbacks") or []
        own = [own] if isinstance(own, Callback) else own
        _check_once(own, callbacks)
        made = L.Trainer(**arguments | {"callbacks": [seeding, *own, *callbacks]})
    elif callable(given):
        made = given(task)  # Any: Lightning sets attributes without declaring them
        _check_new(made, task)
        _check_once(made.callbacks, callbacks)
        # As Lightning orders them: checkpoints last, so that they hold what the others did.
        found = [seeding, *made.callbacks, *callbacks]
        made.callbacks = sorted(found, key=lambda callback: isinstance(callback, Checkpoint))
    else:
        raise InputError(
            f"trainer is a {type(given).__name__}, but every task needs a Trainer of its own; "
            "expected the arguments of each, as in {'max_epochs': 3}, or a function that makes one"
        )
    if isinstance(made.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "fit_stream keeps its results in the process, but spawned processes lose them when a "
            "fit ends; use strategy='ddp' and start the script from the command line"
        )
    return made  # type: ignore[no-any-return]


def _check_once(own: Sequence[Callback], callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that a trainer has already: they would see every task twice."""
    if twice := [type(callback).__name__ for callback in callbacks if callback in own]:
        raise InputError(
            f"{listing(twice)} is among the callbacks of the stream and of the Trainer, and would "
            "see every task twice; expected it in one of them"
        )


def _check_new(trainer: Any, task: Task) -> None:
    """Refuse a trainer that has trained another task: it would train this one not at all."""
    if any(isinstance(callback, _Seeding) for callback in trainer.callbacks):
        raise InputError(
            f"the function given as trainer returned, for {task_name(task.index)}, a Trainer that "
            "has trained another; expected a new one for each"
        )
