"""Keep the features of earlier tasks' images in place, without keeping the images."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.callbacks.batches import own_samples, sum_over_processes, training_batches, trying
from cl_merge.callbacks.feature_drift import FeatureDrift
from cl_merge.callbacks.features import ImageFeatures, image_features_of
from cl_merge.callbacks.fisher import check_cut, fisher_precision, requiring_gradients
from cl_merge.callbacks.regularizer import Penalty
from cl_merge.callbacks.second_moments import second_moments
from cl_merge.errors import InputError
from cl_merge.seeds import derive_seed
from cl_merge.task_vectors.module_weights import parameters_of


class DriftPenalty(Penalty):
    """Penalise changes of weights by how far they move the features of earlier tasks' images.

    Each ``trainer.fit`` is a task. When one ends, some of its images tell by second moments of
    inputs and gradients how a change of each parameter would move its unit features; no image is
    kept. From then on ``weight`` times the squared change that they predict of all earlier tasks'
    features, counted from where the task began, is added to the loss. Its gradient is added in
    closed form before clipping: no graph. Where EWC holds what earlier tasks' *losses* depend on,
    which is little once they are learned, this holds what their *features* depend on.

    Kept are n² + m² numbers for a linear layer or convolution of n inputs, places of its kernel
    counted apart, and m outputs, and one number for each element of other parameters, whatever the
    number of tasks. Each step takes 2 n m (n + m) operations for such a layer, whatever the batch.

    Works with any module and loop under automatic optimisation, any precision, accumulation,
    clipping, and DDP; alone, with `MergeCallback`, `LwF` or `EWC`. The penalty is logged as
    ``drift/penalty``; the module's own loss does not contain it.

    Args:
        weight: Factor of the squared change.
        features: Makes image features [B, D] of the module and a batch; by default
            ``module.features(batch[0])``. What they do not depend on, such as a head, is free.
        samples: Use at most so many samples of a task, each by itself; None uses all.
        seed: Of the directions in which changes of features are measured.

    Attributes:
        penalty: What computes it, in plain torch.

    Raises:
        InputError: If a value is out of its range, or the module has no features.
        RuntimeError: Under manual optimisation, or a strategy that shards parameters or spawns
            processes.

    Example::

        callbacks = [DriftPenalty(), MergeCallback("magmax")]
        for loader in tasks:
            L.Trainer(max_epochs=3, callbacks=[*callbacks]).fit(module, loader)

    Reference:
        Porrello et al., Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored
        Approximate Curvature, ICLR 2026: the penalty, for tasks that all start from the base.
    """

    name = "drift"
    penalty: FeatureDrift

    def __init__(
        self,
        weight: float = 50.0,
        *,
        features: ImageFeatures | None = None,
        samples: int | None = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, samples=samples, seed=seed)
        self.penalty = FeatureDrift()
        self._features = image_features_of(features, "DriftPenalty", "DriftPenalty(features=...)")

    # Hooks, in the order in which they fire.

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        every = {n: p for n, p in parameters_of(module).items() if p.is_floating_point()}
        with trying(trainer, module), torch.enable_grad(), requiring_gradients(every):
            features = self._features(module, batch)
            if not features.requires_grad:
                raise InputError(
                    "DriftPenalty: features have no gradient by any parameter; make them without "
                    "torch.no_grad() and detach()"
                )
            check_cut(batch, features, partial(self._features, module))
        if not self._resumed:
            self.penalty.start(module)

    @override
    def add_gradients(self, module: L.LightningModule, factor: float) -> Tensor | None:
        drift = self.penalty.add_gradients(module, factor * self.weight)
        return None if drift is None else self.weight * drift

    @override
    def remember(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take up what the features of the task at hand depend on."""

        def seed_of(index: int) -> int:
            # Of the place in the epoch, which samplers deal out to the processes by turns.
            place = index * trainer.world_size + trainer.global_rank
            return derive_seed("drift", self.seed, self._tasks, place) % 2**63

        with fisher_precision(trainer, module.device):
            task = second_moments(
                module,
                self.penalty.parameters(module),
                training_batches(trainer, module),
                partial(self._features, module),
                seed_of=seed_of,
                total=sum_over_processes(trainer, module),
                limit=own_samples(trainer, self.samples),
            )
        self.penalty.end_task(task)
        self.penalty.start(module)

    @override
    def task_state(self) -> dict[str, Any]:
        return {"tasks": self._tasks, **self.penalty.state_dict()}

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        self._tasks = state["tasks"]
        self.penalty.load_state_dict(state)
