"""What the callbacks share: every fit is a task, an evaluation outside a fit sees the result."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerState, TrainerStatus
from typing_extensions import override

from cl_merge.errors import InputError

log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=Callback)

_NOTHING_TRAINED = (
    "nothing was trained in this fit: it does not count as a task. Use a new Trainer for each "
    "task: one that has been through a fit has reached its last epoch"
)

WEIGHT_AVERAGING: tuple[type[Callback], ...] = (
    (lightning_callbacks.WeightAveraging,)
    if hasattr(lightning_callbacks, "WeightAveraging")
    else ()
)
"""Lightning's own, which swaps weights in every validation; none before lightning 2.6."""

# What puts other weights into the module when training ends.
_AVERAGES: tuple[type[Callback], ...] = (StochasticWeightAveraging, *WEIGHT_AVERAGING)


class TaskCallback(Callback, ABC):
    """A callback that lives through a stream, with something to do when a task begins and ends.

    Each ``trainer.fit`` is a task, unless it trains nothing. A fit that resumes a checkpoint is the
    rest of the task that the checkpoint was written in, also if nothing is left to train.

    Raises:
        InputError: If a callback that averages weights runs after this one, or has been through
            another task.
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._averages_used: Sequence[Callback] = []
        self._trainer_state = TrainerState()  # of the trainer that was the last to use it
        self._first_step = 0
        self._in_task = False
        self._restored = False
        self._resumed = False

    @property
    @abstractmethod
    def tasks(self) -> int:
        """Number of tasks that ended so far."""

    @abstractmethod
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, *, resumed: bool) -> None:
        """Prepare for a task; the module is on its device, nothing has been trained yet.

        Args:
            trainer: The task's trainer.
            module: The module in training.
            resumed: Whether the fit resumes a checkpoint within the task.
        """

    @abstractmethod
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take up what a task left; the module still holds the trained weights on its device."""

    @abstractmethod
    def task_state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs to go on, as tensors and plain values."""

    @abstractmethod
    def load_task_state(self, state: dict[str, Any]) -> None:
        """Go on from what `task_state` returned; its tensors are to be copied."""

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        name = type(self).__name__
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise RuntimeError(
                f"{name} needs whole parameters on every rank, but "
                f"{type(trainer.strategy).__name__} shards them; use strategy='ddp' or one device"
            )
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise RuntimeError(
                f"{name} keeps its state in the process, but spawned processes lose it when a fit "
                "ends; use strategy='ddp' and start the script from the command line"
            )
        self._trainer_state = trainer.state
        if stage == TrainerFn.FITTING:
            for other in attached(trainer, *_AVERAGES):
                if runs_after(trainer, other, self):
                    average = type(other).__name__
                    raise InputError(
                        f"{average} runs after {name}, which would miss the averaged weights that "
                        "it puts in when training ends; put it in front: "
                        f"callbacks=[{average}(...), {name}(...)]"
                    )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resumed, self._restored = self._restored, False
        if not self._resumed:
            self._refuse_used_averages(trainer)
        self.begin_task(trainer, pl_module, resumed=self._resumed)
        self._in_task = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._averages_used = attached(trainer, *_AVERAGES)
        self._end(trainer, pl_module, trained=trainer.global_step > self._first_step)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Where nothing is left to train, training never "ends": after a checkpoint of the last
        # step, or with a trainer that has reached its last epoch before.
        if self._in_task:
            self._end(trainer, pl_module, trained=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.task_state() | {"in_task": self._in_task}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        running = self._trainer_state.status == TrainerStatus.RUNNING
        fitting = running and self._trainer_state.fn == TrainerFn.FITTING
        if running and not fitting and self.tasks:
            # `test(ckpt_path=...)` restores callbacks too, as they were when the checkpoint was
            # written, within a task: that would undo what the end of that task did.
            return
        self.load_task_state(state_dict)
        self._restored = fitting and state_dict["in_task"]

    def _end(self, trainer: L.Trainer, module: L.LightningModule, *, trained: bool) -> None:
        if trained or self._resumed:
            self.end_task(trainer, module)
        else:
            log.warning(_NOTHING_TRAINED)
        self._in_task = False

    def _refuse_used_averages(self, trainer: L.Trainer) -> None:
        for other in attached(trainer, *_AVERAGES):
            # It remembers the step of its last update, averages nothing up to it, and ends the
            # task with the weights that it began with.
            if any(other is used for used in self._averages_used):
                name = type(other).__name__
                raise InputError(
                    f"this {name} has been through the task before, whose steps it still counts: "
                    f"it would undo this task; make a new {name} for each task"
                )


class EvaluationCallback(TaskCallback):
    """A callback that changes what ``trainer.test``, ``validate`` and ``predict`` see.

    Once a task has ended, and never in the validation within a fit. What it changed is undone when
    the evaluation ends or raises.

    Raises:
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    @abstractmethod
    def begin_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Prepare the module, which is on its device, for an evaluation."""

    @abstractmethod
    def end_evaluation(self, module: L.LightningModule) -> None:
        """Leave the module as it was before; also called where no evaluation has begun."""

    # Hooks, in the order in which they fire.

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.tasks and trainer.state.fn != TrainerFn.FITTING:
            self.begin_evaluation(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_evaluation(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.end_evaluation(pl_module)


def attached(trainer: L.Trainer, *kinds: type[_Kind]) -> list[_Kind]:
    """The callbacks of a trainer that are of one of the classes, in its order."""
    return [callback for callback in _callbacks(trainer) if isinstance(callback, kinds)]


def runs_after(trainer: L.Trainer, one: Callback, other: Callback) -> bool:
    """Whether hooks of one callback of a trainer fire after those of the other."""
    callbacks = _callbacks(trainer)
    return callbacks.index(one) > callbacks.index(other)


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    # Lightning's connector sets it, which type checkers do not see.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
