"""Live progress of a whole run: one bar, from the first batch to the last evaluation."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from typing_extensions import override

TRAIN_COST = 3
"""What a training batch costs, in evaluation batches: forward and backward, about."""


class RunProgress(Callback):
    """Show what is going on, the loss, and the time left of the whole run.

    Shows nothing on a console that is no terminal, and nothing on processes other than the first.
    `total` is that of `count_batches`.
    """

    def __init__(self, console: Console, total: int) -> None:
        super().__init__()
        self._progress = Progress(
            TextColumn("{task.description}{task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # Drawing takes 2 ms of the processor that trains: ten times a second, 2 % of its time.
            refresh_per_second=2,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("starting", total=total, epoch="", loss="")

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def describe(self, doing: str) -> None:
        """Say what goes on now, in a few words such as ``"task 2/5"``."""
        self._progress.update(self._bar, description=doing, epoch="", loss="")

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = f", epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._progress.update(self._bar, epoch=epoch)

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        _, _, outputs, _, batch_idx = args
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        # Reading the loss waits for the device: not more often than an eye can follow.
        if isinstance(loss, Tensor) and batch_idx % 10 == 0:
            self._progress.update(self._bar, loss=f"loss {loss.item():.3f}")
        self._progress.advance(self._bar, TRAIN_COST)

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._progress.advance(self._bar)
