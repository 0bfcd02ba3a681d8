"""How much each element of a task vector matters, for mergers that weigh elements."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from torch import Tensor

from cl_merge.callbacks.ewc import EWC


def task_importance(
    trainer: L.Trainer,
    module: L.LightningModule,
    vector: Mapping[str, Tensor],
    *,
    samples: int | None,
    task: int,
) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher information of a task that ended, as `EWC` does.

    Args:
        trainer: The task's trainer.
        module: The module with the trained weights.
        vector: The task vector; the importance has its names and devices.
        samples: Use at most so many samples of the task, None for all; each takes a backward pass.
        task: Index of the task, which seeds the labels drawn from the model's predictions.

    Returns:
        The importance of each element, not negative, float32 or better.

    Reference:
        Matena & Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, section 3.
    """
    estimate = EWC("sampled", from_zero=False, samples=samples, seed=task)
    estimate.remember(trainer, module)
    return {name: estimate.fisher[name].to(tensor.device) for name, tensor in vector.items()}
