"""Callbacks that have a hand in every evaluation outside a fit."""

from __future__ import annotations

from abc import abstractmethod

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from cl_merge.callbacks.task import TaskCallback


class EvaluationCallback(TaskCallback):
    """A callback that changes what ``trainer.test``, ``validate`` and ``predict`` see.

    Once a task has ended, and never in the validation within a fit. What it changed is undone when
    the evaluation ends or raises.

    Raises:
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    @abstractmethod
    def begin_evaluation(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare the module for an evaluation.

        Args:
            trainer: Its trainer.
            pl_module: The module, on the device of the evaluation.
        """

    @abstractmethod
    def end_evaluation(self, pl_module: L.LightningModule) -> None:
        """Leave the module as it was before; also called where no evaluation has begun.

        Args:
            pl_module: The module.
        """

    # Hooks, in the order in which they fire.

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_evaluation(pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_evaluation(pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_evaluation(pl_module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.end_evaluation(pl_module)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.tasks:
            self.begin_evaluation(trainer, module)
