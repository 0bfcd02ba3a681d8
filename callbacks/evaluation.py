"""Evaluate other weights than those that are trained."""

from __future__ import annotations

from abc import abstractmethod

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.task import TaskCallback
from cl_merge.errors import InputError
from cl_merge.weights import copies, floating_buffers, install, trained_parameters


class EvaluationCallback(TaskCallback):
    """A callback that puts weights of its own into a module for every evaluation outside a fit.

    ``trainer.test``, ``trainer.validate`` and ``trainer.predict`` see them once a task has ended;
    the trained weights and buffers are back, bit for bit, when they end or raise.

    Raises:
        InputError: In ``trainer.validate``, if `WeightAveraging` is there, which would put its own
            weights in.
        RuntimeError: Under a strategy that shards parameters or spawns processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trained: dict[str, Tensor] | None = None

    @abstractmethod
    def install(self, module: nn.Module) -> None:
        """Put the weights to evaluate into a module.

        Args:
            module: The module in training.
        """

    # Hooks, in the order in which they fire.

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_average(trainer)
            self.begin_evaluation(pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_trained(pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin_evaluation(pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_trained(pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin_evaluation(pl_module)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_trained(pl_module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._restore_trained(pl_module)

    def begin_evaluation(self, module: nn.Module) -> None:
        """Keep the trained weights and put the others in, if there are any yet.

        Args:
            module: The module, on the device of the evaluation.
        """
        if self.tasks:
            self._trained = copies(trained_parameters(module) | floating_buffers(module))
            self.install(module)

    def _check_average(self, trainer: L.Trainer) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            # From its fit on, it swaps weights in every validation, after this hook.
            if isinstance(other, WeightAveraging) and other._average_model is not None:
                name = type(self).__name__
                raise InputError(
                    f"{type(other).__name__} would validate its average instead of what {name} "
                    f"puts in; validate with a new Trainer without it: "
                    f"L.Trainer(callbacks=[the {name}])"
                )

    def _restore_trained(self, module: nn.Module) -> None:
        if self._trained is not None:
            install(trained_parameters(module) | floating_buffers(module), self._trained)
            self._trained = None
