"""What the callbacks of this package share: every fit is a task."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from cl_merge.errors import InputError

log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=Callback)

_NOTHING = (
    "nothing was trained in this fit: it does not count as a task. Use a new Trainer for each "
    "task: one that has been through a fit has reached its last epoch"
)

# What puts other weights into the module when training ends.
_AVERAGES = (StochasticWeightAveraging, WeightAveraging)


class TaskCallback(Callback, ABC):
    """A callback that lives through a stream, with something to do when a task begins and ends.

    Each ``trainer.fit`` is a task, unless it trains nothing. A fit that goes on from a checkpoint
    is the rest of the task that the checkpoint was written in, also if nothing is left to train.

    Raises:
        InputError: If a callback that averages weights stands behind, or has been through another
            task.
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._averages_used: Sequence[Callback] = []
        self._stage = ""
        self._first_step = 0
        self._in_task = False
        self._restored = False
        self._goes_on = False

    @property
    @abstractmethod
    def tasks(self) -> int:
        """Number of tasks that ended so far."""

    @abstractmethod
    def begin_task(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *, goes_on: bool
    ) -> None:
        """Prepare for a task; the module is on its device, nothing has been trained yet.

        Args:
            trainer: The task's trainer.
            pl_module: The module.
            goes_on: Whether the fit goes on from a checkpoint within the task.
        """

    @abstractmethod
    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up what a task left; the module still holds the trained weights on its device.

        Args:
            trainer: The task's trainer.
            pl_module: The module.
        """

    @abstractmethod
    def task_state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs to go on, as tensors and plain values."""

    @abstractmethod
    def load_task_state(self, state: dict[str, Any]) -> None:
        """Go on from what `task_state` returned; its tensors are to be copied."""

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = stage
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
        if stage == TrainerFn.FITTING:
            self._check_order(trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._goes_on, self._restored = self._restored, False
        if not self._goes_on:
            self._check_averages(trainer)
        self.begin_task(trainer, pl_module, goes_on=self._goes_on)
        self._in_task = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._first_step or self._goes_on:
            self.end_task(trainer, pl_module)
        else:
            log.warning(_NOTHING)
        self._averages_used = attached(trainer, *_AVERAGES)
        self._in_task = False

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Where nothing is left to train, training never "ends": after a checkpoint of the last
        # step, or with a trainer that has reached its last epoch before.
        if self._in_task and self._goes_on:
            self.end_task(trainer, pl_module)
        elif self._in_task:
            log.warning(_NOTHING)
        self._in_task = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.task_state() | {"in_task": self._in_task}

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = ""

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stage = ""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage not in ("", TrainerFn.FITTING) and self.tasks:
            # `test(ckpt_path=...)` restores callbacks too, as they were when the checkpoint was
            # written, within a task: that would undo what the end of that task did.
            return
        self.load_task_state(state_dict)
        self._restored = self._stage == TrainerFn.FITTING and state_dict["in_task"]

    def _check_order(self, trainer: L.Trainer) -> None:
        for other in attached(trainer, *_AVERAGES):
            if stands_behind(trainer, other, self):
                name, average = type(self).__name__, type(other).__name__
                raise InputError(
                    f"{average} stands behind {name}, which would miss the averaged weights that "
                    f"it puts in when training ends; put it in front: callbacks=[{average}(...), "
                    f"{name}(...)]"
                )

    def _check_averages(self, trainer: L.Trainer) -> None:
        for other in attached(trainer, *_AVERAGES):
            # It remembers the step of its last update, averages nothing up to it, and ends the
            # task with the weights that it began with.
            if any(other is used for used in self._averages_used):
                name = type(other).__name__
                raise InputError(
                    f"this {name} has been through the task before, whose steps it still counts: "
                    f"it would undo this task; make a new {name} for each task"
                )


def attached(trainer: L.Trainer, *kinds: type[_Kind]) -> list[_Kind]:
    """Find callbacks of a trainer.

    Args:
        trainer: The trainer.
        kinds: Their classes.

    Returns:
        Those that are of one of the classes, in the trainer's order.
    """
    return [found for found in _callbacks(trainer) if isinstance(found, kinds)]


def stands_behind(trainer: L.Trainer, one: Callback, other: Callback) -> bool:
    """Tell whether hooks of one callback of a trainer fire after those of another.

    Args:
        trainer: The trainer.
        one: One of its callbacks.
        other: Another.

    Returns:
        Whether `one` stands behind `other`.
    """
    callbacks = _callbacks(trainer)
    return callbacks.index(one) > callbacks.index(other)


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    # Lightning's connector sets it, which type checkers do not see.
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found
