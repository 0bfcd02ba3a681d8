"""Keep what every task changed, and evaluate with the merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.task import TaskCallback
from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.mergers import Average, Merger, get_merger
from cl_merge.task_vector import TaskVector, check_scale, moved
from cl_merge.weights import (
    check_same_parameters,
    copies,
    floating_buffers,
    install,
    trained_parameters,
)

STARTS = ("sequential", "independent", "merged")
BUFFERS = ("trained", "base", "average")


class MergeCallback(TaskCallback):
    """Merge the tasks that a module learns one after another.

    Each ``trainer.fit`` is a task. The first one fixes the base, the weights before any training.
    When a fit ends without an exception, what it changed, the task vector, is folded into the
    merger; the memory it takes does not grow with the number of tasks. ``trainer.test``,
    ``trainer.validate`` and ``trainer.predict`` see the base plus `scale` times the merged task
    vector, and the trained weights are back, bit for bit, when they end or raise. Validation inside
    ``fit`` sees the weights being trained.

    Works with any `LightningModule`, any optimizer and precision, on one process or under DDP,
    where every rank folds the same weights. Use one instance for the whole stream, and a new
    `Trainer` per task. Place it after callbacks that change weights when training ends, such as
    `WeightAveraging`.

    Args:
        method: ``"magmax"``, another name that `cl_merge.get_merger` knows, or a fresh `Merger`.
        scale: Factor of the merged task vector; None takes the one that the method was published
            with.
        start: Where the training of a task starts: ``"sequential"`` at the weights that the last
            task left, ``"independent"`` at the base, ``"merged"`` at the merged model.
        buffers: What floating-point buffers, such as batch-norm statistics, hold during evaluation:
            ``"trained"`` those of the last task, ``"base"`` those before any training,
            ``"average"`` their mean over tasks. None means ``"trained"``, with a warning that names
            the buffers that moved.
        directory: Folder in which to write each task vector, as ``task0.safetensors`` and so on.
        device: Where the base and the merged vector are kept.
        **options: Options of the method, such as ``density`` for TIES.

    Attributes:
        tasks: Number of tasks folded so far.
        base: The weights before any training, by parameter name.

    Raises:
        InputError: If the method, an option or a value is wrong, a task vector is not finite, or
            the parameters that train are not those of the first task.
        RuntimeError: Under a strategy that shards parameters or spawns processes.

    Example::

        merge = MergeCallback("magmax")
        for loader in tasks:
            trainer = L.Trainer(max_epochs=1, callbacks=[merge])
            trainer.fit(module, loader)
            trainer.test(module, test_loader)   # the merged model
        merge.install(module)                   # keep it

    Reference:
        Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, ECCV 2024.
    """

    def __init__(
        self,
        method: str | Merger = "magmax",
        *,
        scale: float | None = None,
        start: str = "sequential",
        buffers: str | None = None,
        directory: str | Path | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
        if buffers is not None and buffers not in BUFFERS:
            raise unknown_name("choice of buffers", buffers, BUFFERS)
        self.merger = method if isinstance(method, Merger) else get_merger(method, **options)
        self.start = start
        self.scale = check_scale(self.merger.published_scale if scale is None else scale)
        self.base: dict[str, Tensor] = {}
        self._buffers = buffers
        self._base_buffers: dict[str, Tensor] = {}
        self._buffer_average = Average()
        self._directory = Path(directory) if directory is not None else None
        self._device = torch.device(device)
        self._trained: dict[str, Tensor] | None = None

    @property
    @override
    def tasks(self) -> int:
        """Number of tasks folded so far."""
        return self.merger.tasks

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=self.merger.name, start=self.start)

    def merged(self) -> TaskVector:
        """The merged task vector of the tasks so far, float32 by parameter name."""
        return self.merger.merged()

    def task_vector(self, module: nn.Module) -> TaskVector:
        """The difference of a module's weights to the base.

        Args:
            module: The module in training, or one with the same parameters.

        Returns:
            The task vector, float32 by parameter name, on `device`.

        Raises:
            InputError: If the parameters differ from those of the first task, or one is not finite.
        """
        return TaskVector.between(self.base, trained_parameters(module))

    def install(self, module: nn.Module) -> None:
        """Put the merged weights into a module, to stay.

        Args:
            module: The module in training, or one with the same parameters.

        Raises:
            InputError: If no task has been folded yet.
        """
        if self.tasks == 0:
            raise InputError("nothing to install: no task has been trained and merged yet")
        install(trained_parameters(module), self._merged_weights())
        install(floating_buffers(module), self._evaluation_buffers())

    # Hooks, in the order in which they fire.

    @override
    def begin_task(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *, goes_on: bool
    ) -> None:
        live = trained_parameters(pl_module)
        if not self.base:
            self.base = copies(live, self._device)
            self._base_buffers = copies(floating_buffers(pl_module), self._device)
        check_same_parameters(self.base, live, "MergeCallback")
        # Weights from a checkpoint within a task are where that task stood, and stay.
        if self.tasks and not goes_on:
            self._set_start(pl_module)

    @override
    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            vector = self.task_vector(pl_module)
        except InputError as error:
            raise InputError(f"task {self.tasks}: {error}") from error
        self.merger.update(vector)
        self._fold_buffers(pl_module)
        if self._directory is not None and trainer.is_global_zero:
            vector.save(self._directory / f"task{self.tasks - 1}.safetensors")

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show_merged(pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_trained(pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_merged(pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_trained(pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_merged(pl_module)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_trained(pl_module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._restore_trained(pl_module)

    @override
    def task_state(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "base_buffers": self._base_buffers,
            "merger": self.merger.state_dict(),
            "buffer_average": self._buffer_average.state_dict(),
        }

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        self.base = copies(state["base"], self._device)
        self._base_buffers = copies(state["base_buffers"], self._device)
        self.merger.load_state_dict(state["merger"])
        self._buffer_average.load_state_dict(state["buffer_average"])

    def _set_start(self, module: nn.Module) -> None:
        if self.start == "independent":
            install(trained_parameters(module), self.base)
            install(floating_buffers(module), self._base_buffers)
        elif self.start == "merged":
            self.install(module)

    def _show_merged(self, module: nn.Module) -> None:
        if self.tasks == 0:
            return
        self._trained = copies(trained_parameters(module) | floating_buffers(module))
        self.install(module)

    def _restore_trained(self, module: nn.Module) -> None:
        if self._trained is not None:
            install(trained_parameters(module) | floating_buffers(module), self._trained)
            self._trained = None

    def _merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, change in self.merger.items():
            yield name, moved(self.base[name], change, self.scale)

    def _fold_buffers(self, module: nn.Module) -> None:
        live = floating_buffers(module)
        changed = [
            name
            for name, before in self._base_buffers.items()
            if not torch.equal(live[name].to(before.device), before)
        ]
        if self._buffers is None and changed:
            rank_zero_warn(
                f"{len(changed)} floating-point buffers moved during training and are not merged: "
                f"{listing(changed)}. Evaluation uses those of the last task; choose with "
                "MergeCallback(buffers='trained' | 'base' | 'average'), or freeze them"
            )
            self._buffers = "trained"
        if self._buffers == "average":
            self._buffer_average.update(copies(live, self._device))

    def _evaluation_buffers(self) -> dict[str, Tensor]:
        if self._buffers == "base":
            return self._base_buffers
        if self._buffers == "average":
            return dict(self._buffer_average.items())
        return {}
