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
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from cl_merge.callbacks.others import callbacks_of, check_new, check_strategy, to_be_new
from cl_merge.training.callback_state import state_of

log = logging.getLogger(__name__)

_NOTHING_TRAINED = (
    "nothing was trained in this fit: it does not count as a task. Use a new Trainer for each "
    "task: one that has been through a fit has reached its last epoch"
)

_NO_STATE = (
    "the checkpoint was written without this {}, which knows nothing of what was trained before: a "
    "fit starts from the checkpoint's weights, an evaluation sees them as they are"
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
        self._began = False  # whether this fit has trained a batch
        self._resumed = False  # whether it is the rest of a task
        self._ends_in_steps = False  # whether `end_task` may raise with half of it done

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

    def choose_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put in the weights that count for a task, before any callback takes up what it left."""

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
        self._resumed = False
        self._trainer_state = trainer.state

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._resumed:
            check_new(trainer, self._used)
        self._began = False
        self.prepare_task(trainer, pl_module)
        self._in_task, self._before = True, self.tasks

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
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
        # Before its first batch a task has not begun; an interrupted one may have ended by hand.
        in_task = self._in_task and (self._began or self._resumed) and self.tasks == self._before
        return self.task_state() | {"in_task": in_task}

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Refuses those of other options.
        saved = state_of(self, checkpoint["callbacks"])
        matters = self._runs(fit=True) or isinstance(self, EvaluationCallback)
        if saved is None and matters and not self.tasks:
            rank_zero_warn(_NO_STATE.format(type(self).__name__))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._runs(fit=False) and self.tasks:
            # `test(ckpt_path=...)` restores callbacks too, as they were when the checkpoint was
            # written, within a task: that would undo what the end of that task did.
            return
        self.load_task_state(state_dict)
        self._before = self.tasks
        # Before ``on_fit_start``, or after it under strategies that shard parameters.
        self._resumed = self._runs(fit=True) and state_dict["in_task"]

    def _runs(self, *, fit: bool) -> bool:
        """Whether the trainer is in a fit, or else in an evaluation outside of one."""
        state = self._trainer_state
        return state.status == TrainerStatus.RUNNING and (state.fn == TrainerFn.FITTING) == fit


class EvaluationCallback(TaskCallback):
    """A callback that changes what ``trainer.test``, ``validate`` and ``predict`` see.

    Once a task has ended, and never in the validation within a fit. What it changed is undone when
    the evaluation ends or raises. An evaluation of a checkpoint sees the state that the checkpoint
    holds; afterwards the callback is as before, unless it knew nothing.

    Raises:
        InputError: If something else changes what it changed.
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded = False  # whether a checkpoint that is evaluated holds a state
        self._unfinished = False  # and whether that is of within a task
        self._go_back: Callable[[], None] | None = None  # to the state before

    @property
    def has_result(self) -> bool:
        """Whether there is something that an evaluation can see."""
        return self.tasks > 0 or self._unfinished

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
        self._leave_checkpoint()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave_checkpoint()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._runs(fit=False):
            super().load_state_dict(state_dict)
            return
        if self.tasks or self._in_task:
            self._go_back = self.backup()
        self.load_task_state(state_dict)
        self._loaded, self._unfinished = True, state_dict["in_task"]

    def _leave_checkpoint(self) -> None:
        if self._go_back is not None:
            self._go_back()
        self._loaded, self._unfinished, self._go_back = False, False, None


def _end_task_of_all(
    ending: Sequence[TaskCallback], trainer: L.Trainer, module: L.LightningModule
) -> None:
    """End a task for all callbacks, or, if one raises, for none."""
    trained = [callback for callback in ending if callback._began or callback._resumed]
    backups: list[Callable[[], None]] = []
    try:
        if len(trained) < len(ending):
            log.warning(_NOTHING_TRAINED)
        with _on_its_device(trainer, module):
            for callback in trained:
                callback.choose_weights(trainer, module)
            for callback in trained:
                if callback is not trained[-1] or callback._ends_in_steps:
                    backups.append(callback.backup())
                callback.end_task(trainer, module)
    except BaseException:
        for undo in backups:
            undo()
        raise
    finally:
        for callback in ending:
            callback._in_task = False


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
