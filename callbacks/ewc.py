"""Elastic weight consolidation: stay close in the directions that earlier tasks depend on."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.batches import Logits, sum_over_processes, training_batches
from cl_merge.callbacks.ewc_penalty import EWCPenalty
from cl_merge.callbacks.fisher import (
    TaskFisher,
    fisher_precision,
    published_fisher,
    requiring_gradients,
    zeros_for,
)
from cl_merge.callbacks.outputs import Loss
from cl_merge.callbacks.regularizer import Penalty
from cl_merge.errors import InputError, unknown_name
from cl_merge.task_vectors.module_weights import copies, install

# The size of a Fisher depends on its kind, so each needs a weight of its own.
WEIGHTS = {"published": 1e6, "empirical": 1e4, "sampled": 1e4}

_OTHERS = "choose fisher='empirical' or 'sampled'"


class EWC(Penalty):
    """Penalise moves away from the weights of the previous task, by how much that task needs them.

    Each ``trainer.fit`` is a task. When one ends, the diagonal F of its Fisher information is
    estimated in one more pass over its training data and taken into a running average, and its
    weights become the anchor p*. From then on ``weight / 2 * sum F (p - p*)^2`` is added to the
    loss. Its gradient, ``weight * F * (p - p*)``, is added in closed form before clipping: no
    graph, and no memory beyond F, p* and one parameter at a time.

    Works with any module and loop under automatic optimisation, any precision, accumulation,
    clipping, and DDP; alone, with `MergeCallback` (EWC + MagMax) or with `LwF`. The penalty is
    logged as ``ewc/penalty``; the module's own loss does not contain it.

    Args:
        fisher: Which estimate: ``"empirical"`` is the textbook's mean of squared gradients of
            single samples with their true labels, ``"sampled"`` the same with labels drawn from the
            model, ``"published"`` that of the MagMax runs (predicted labels, gradients of batches
            that add up over batches). See `cl_merge.callbacks.fisher`.
        weight: Factor of the penalty; None takes the default of the estimate: 1e6 for
            ``"published"``, 1e4 for the others.
        decay: Share of the former F in the running average.
        from_zero: Start the running average at zero, as published, which multiplies the first
            estimate by ``1 - decay``; False takes the first estimate whole.
        first_task: Estimate F of the weights before any training on the first task's data, and
            penalise the first task too. The published runs train it freely.
        logits: Makes logits [B, K] and targets [B] of the module and a batch. By default the
            module's ``task_logits(batch)`` if it has one, as `CLIPClassifier` does, else
            ``module(batch[0]), batch[1]``.
        loss: What the logits are trained with, ``"cross_entropy"``, ``"binary_cross_entropy"``, one
            label for each output, or ``"mse"``, whose noise has variance 1. None is the first, and
            refuses a single output and targets that are no classes.
        samples: Use at most so many samples of a task for ``"empirical"`` and ``"sampled"``, which
            take each by itself; None uses all.
        seed: Of the labels drawn for ``"sampled"``.

    Attributes:
        penalty: What computes it, in plain torch.

    Raises:
        InputError: If a value is out of its range, or the module's logits cannot be found.
        RuntimeError: Under manual optimisation, or a strategy that shards parameters or spawns
            processes.

    Example::

        callbacks = [EWC(), MergeCallback("magmax")]
        for loader in tasks:
            L.Trainer(max_epochs=3, callbacks=[*callbacks]).fit(module, loader)

    Reference:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017; the
        running average: Schwarz et al., Progress & Compress, ICML 2018.
    """

    name = "ewc"
    penalty: EWCPenalty

    def __init__(
        self,
        fisher: str = "empirical",
        *,
        weight: float | None = None,
        decay: float = 0.5,
        from_zero: bool = True,
        first_task: bool = False,
        logits: Logits | None = None,
        loss: Loss | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if fisher not in WEIGHTS:
            raise unknown_name("Fisher estimate", fisher, WEIGHTS)
        weight = WEIGHTS[fisher] if weight is None else weight
        super().__init__(weight, samples=samples, seed=seed, first_task=first_task)
        self.kind = fisher
        self.penalty = EWCPenalty(self.weight, decay=decay, from_zero=from_zero)
        self._fisher = TaskFisher("EWC", logits, loss, samples)
        if fisher == "published" and loss not in (None, "cross_entropy"):
            raise InputError(f"EWC('published') is of classes, not of loss='{loss}'; {_OTHERS}")

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The running average F, by parameter name; empty before the first task ended."""
        return self.penalty.fisher

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The weights p*, by parameter name."""
        return self.penalty.anchor

    # Hooks, in the order in which they fire.

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        self._fisher.check(trainer, module, batch, singly=self.kind != "published")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.first_task and not self.fisher:
            _check_fresh_workers(trainer)
            self.remember(trainer, pl_module)
        if self.kind == "published" and self.weight and not trainer.gradient_clip_val:
            rank_zero_warn(
                "EWC('published') carries the last gradient of a task, its own penalty's included, "
                "into the next Fisher. The published runs clip that gradient to norm 1; without "
                "Trainer(gradient_clip_val=1.0) the estimate can grow from task to task until the "
                "weights diverge"
            )

    @override
    def add_gradients(self, module: L.LightningModule, factor: float) -> Tensor | None:
        self.penalty.weight = self.weight  # which may be set at any time
        return self.penalty.add_gradients(module, factor)

    @override
    def remember(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Fold the Fisher of the task at hand into the running average, and move the anchor."""
        trained = self.penalty.parameters(module)
        with requiring_gradients(trained):
            estimate = self._estimate(trainer, module, trained)
        self.penalty.remember(trained, estimate)

    @override
    def task_state(self) -> dict[str, Any]:
        return {"kind": self.kind, "tasks": self._tasks, **self.penalty.state_dict()}

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise InputError(
                f"the saved state of EWC is of fisher='{state['kind']}', but this one is "
                f"fisher='{self.kind}'; make it with the saved one"
            )
        self._tasks = state["tasks"]
        self.penalty.load_state_dict(state)

    def _estimate(
        self, trainer: L.Trainer, module: L.LightningModule, trained: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        if self.kind != "published":
            seed = (self.seed, self._tasks) if self.kind == "sampled" else None
            return self._fisher.of(trainer, module, trained, seed)
        buffers = copies(dict(module.named_buffers()))
        with torch.enable_grad(), fisher_precision(trainer, module.device):
            estimate = published_fisher(
                trained,
                training_batches(trainer, module),
                partial(self._fisher.classify, module),
                self._last_gradients(trained),
                total=sum_over_processes(trainer, module),
                processes=trainer.world_size,
            )
        # Batch norms in training mode have seen another epoch that is none. What did not move may
        # be a metric's, made in inference mode, and must not be touched.
        live = dict(module.named_buffers())
        moved = {name for name, before in buffers.items() if not torch.equal(live[name], before)}
        install(live, {name: buffers[name] for name in moved})
        return estimate

    def _last_gradients(self, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """What the last step of the training left in ``.grad``."""
        if self._resumed and not self._began:
            rank_zero_warn(
                "EWC: this checkpoint is of the task's last step, whose gradient it does not hold; "
                "the published estimate starts from zero instead"
            )
        gradients = zeros_for(trained)
        for name, parameter in trained.items():
            if parameter.grad is not None:
                gradients[name].add_(parameter.grad, alpha=1.0 / self._scale)
        return gradients


def _check_fresh_workers(trainer: L.Trainer) -> None:
    """A loader with persistent workers has one iterator, and the trainer has already begun it."""
    if getattr(trainer.train_dataloader, "persistent_workers", False):
        raise InputError(
            "EWC(first_task=True) reads the training data before the first step, which a loader "
            "with persistent_workers=True cannot do twice; set persistent_workers=False"
        )
