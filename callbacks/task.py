"""What the callbacks share: every fit is a task, an evaluation outside a fit sees the result."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn, TrainerState, TrainerStatus
from typing_extensions import override

from cl_merge.callbacks.others import callbacks_of, check_new, check_strategy, to_be_new
from cl_merge.training.callback_state import state_of

log = logging.getLogger(__name__)

_NOTHING_TRAINED = (
    "nothing was trained in this fit: it does not count as a task. Use a new Trainer for each "
    "task: one that has been through a fit has reached its last epoch"
)


class TaskCallback(Callback, ABC):
    """A callback that lives through a stream, with something to do when a task begins and ends.

    Each ``trainer.fit`` is a task, unless it trains nothing. A fit that resumes a checkpoint is the
    rest of the task that the checkpoint was written in, also if nothing is left to train. A task
    ends after all that other callbacks and the module do in ``on_train_end``. It counts for all
    callbacks of this kind in a trainer, or, if one of them raises, for none.

    Attributes:
        can_shard: Whether it works where parameters are sharded, under ``ModelParallelStrategy``.

    Raises:
        InputError: If a callback that must be new for each task has been through another one.
        RuntimeError: Under a strategy that spawns processes, or shards parameters in a way that
            the callback cannot work with.
    """

    can_shard: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._used: Sequence[Callback] = []
        self._trainer_state = TrainerState()  # of the trainer that was the last to use it
        self._in_task = False
        self._before = 0  # tasks that had ended when this one began
        self._prepared = False  # whether ``on_fit_start`` has been, and no batch yet
        self._began = False  # whether this fit has trained a batch
        self._restored = False
        self._resumed = False
        self._unfinished = False  # whether a checkpoint that is evaluated is of within a task

    def __repr__(self) -> str:
        return f"<{self.state_key}: tasks={self.tasks}>"

    @property
    @abstractmethod
    def tasks(self) -> int:
        """Number of tasks that ended so far."""

    def prepare_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Prepare for a task; the module is on its device, but may be given other weights yet."""

    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Take up where a task starts, from a module with its weights, before its first batch."""

    def watch(self) -> None:
        """Look for parameters that have been unfrozen within the task, before they move."""

    @abstractmethod
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take up what a task left; the module still holds the trained weights on its device."""

    @abstractmethod
    def task_state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs to go on, as tensors and plain values."""

    def backup(self) -> Callable[[], None]:
        """Copy the state; what is returned goes back to it."""
        return partial(self.load_task_state, copy.deepcopy(self.task_state()))

    @abstractmethod
    def load_task_state(self, state: dict[str, Any]) -> None:
        """Go on from what `task_state` returned; its tensors are to be copied."""

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy(trainer, type(self).__name__, can_shard=self.can_shard)
        self._prepared = False
        self._trainer_state = trainer.state

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resumed, self._restored = self._restored, False
        if not self._resumed:
            check_new(trainer, self._used)
        self._began = False
        self.prepare_task(trainer, pl_module)
        self._in_task, self._prepared, self._before = True, True, self.tasks

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._prepared = False
        if not self._began:
            self.begin_task(trainer, pl_module, batch)
            self._began = True
        self.watch()

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.watch()  # hooks that ran since may have unfrozen more

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._used = to_be_new(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only now have all others, and the module, done what they do when training ends.
        every = [c for c in callbacks_of(trainer) if isinstance(c, TaskCallback)]
        if self is every[0]:
            _end_task_of_all([c for c in every if c._in_task], trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        # An interrupted task may have been ended by hand.
        return self.task_state() | {"in_task": self._in_task and self.tasks == self._before}

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state_of(self, checkpoint["callbacks"])  # refuses those of other options

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        running = self._trainer_state.status == TrainerStatus.RUNNING
        fitting = running and self._trainer_state.fn == TrainerFn.FITTING
        self._unfinished = running and not fitting and state_dict["in_task"]
        if running and not fitting and self.tasks:
            # `test(ckpt_path=...)` restores callbacks too, as they were when the checkpoint was
            # written, within a task: that would undo what the end of that task did.
            return
        self.load_task_state(state_dict)
        self._before = self.tasks
        restored = fitting and state_dict["in_task"]
        if self._prepared:  # strategies that shard parameters restore after ``on_fit_start``
            self._resumed = restored
        else:
            self._restored = restored


class EvaluationCallback(TaskCallback):
    """A callback that changes what ``trainer.test``, ``validate`` and ``predict`` see.

    Once a task has ended, and never in the validation within a fit. What it changed is undone when
    the evaluation ends or raises.

    Raises:
        InputError: If something else changes what it changed.
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    @property
    def has_result(self) -> bool:
        """Whether there is something that an evaluation can see."""
        return self.tasks > 0

    @abstractmethod
    def begin_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Prepare the module, which is on its device, for an evaluation."""

    def check_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Make sure that the module is as it was prepared; called before each batch."""

    @abstractmethod
    def end_evaluation(
        self, trainer: L.Trainer, module: L.LightningModule, *, failed: bool
    ) -> None:
        """Leave the module as it was before; also called where no evaluation has begun.

        Where the evaluation failed, this must not raise.
        """

    # Hooks, in the order in which they fire.

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.has_result and trainer.state.fn != TrainerFn.FITTING:
            self.begin_evaluation(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.check_evaluation(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_evaluation(trainer, pl_module, failed=False)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.end_evaluation(trainer, pl_module, failed=True)


def _end_task_of_all(
    ending: Sequence[TaskCallback], trainer: L.Trainer, module: L.LightningModule
) -> None:
    """End a task for all callbacks, or, if one raises, for none."""
    backups: list[Callable[[], None]] = []
    try:
        with _on_its_device(trainer, module):
            for callback in ending:
                if not (callback._began or callback._resumed):
                    log.warning(_NOTHING_TRAINED)
                    continue
                if callback is not ending[-1]:
                    backups.append(callback.backup())
                callback.end_task(trainer, module)
    except BaseException:
        for undo in backups:
            undo()
        raise
    finally:
        for callback in ending:
            callback._in_task = callback._prepared = False


@contextmanager
def _on_its_device(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Hold a module where it was trained: when a fit ends, Lightning has taken it to the CPU."""
    device = trainer.strategy.root_device
    if module.device == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.cpu()
