"""What the regularizers share: adding a term to the loss of any module."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar, Protocol, TypeAlias

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.callbacks.task import TaskCallback
from cl_merge.errors import InputError
from cl_merge.task_vectors.growth import check_grown
from cl_merge.task_vectors.module_weights import parameters_of

LossTerm: TypeAlias = Callable[[], AbstractContextManager[Callable[[], Tensor]]]
"""Watches a training step inside a context, whose value then makes the term, a scalar."""


class Regularizer(TaskCallback):
    """A callback that keeps a module close to what it was after the tasks before.

    Args:
        weight: Factor of the term in the loss.
        first_task: Regularize the first task too, towards the weights before any training. The
            published runs train it freely.

    Raises:
        InputError: If the weight is not a finite number from 0 up.
        RuntimeError: Under manual optimisation, or a strategy that shards parameters or spawns
            processes.
    """

    def __init__(self, weight: float, *, first_task: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(
                f"weight={weight} of {type(self).__name__}; expected 0 or more, finite"
            )
        self.weight = weight
        self.first_task = first_task
        self._tasks = 0

    @property
    @override
    def tasks(self) -> int:
        """Number of tasks that ended so far."""
        return self._tasks

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not pl_module.automatic_optimization:
            raise RuntimeError(
                f"{type(self).__name__} adds to the loss that Lightning optimises, but "
                f"{type(pl_module).__name__} sets automatic_optimization=False; let Lightning "
                "optimise, or add the term in your own training_step"
            )

    @override
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.remember(trainer, module)
        self._tasks += 1

    @abstractmethod
    def remember(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep what later tasks shall stay close to, of a module with the trained weights."""


class Anchored(Protocol):
    """What a `Penalty` keeps of earlier tasks: weights by name, and whatever else."""

    anchor: dict[str, Tensor]

    def move_to(self, device: torch.device) -> None:
        """Move all of it to a device."""


class Penalty(Regularizer):
    """A regularizer whose gradient is added in closed form, before clipping: no graph.

    Its value is logged as ``NAME/penalty``; the module's own loss does not contain it.

    Args:
        weight: Factor of the penalty.
        samples: Estimate from at most so many samples of a task; None uses all.
        seed: Of what an estimate draws.
        first_task: As of `Regularizer`.

    Attributes:
        penalty: What computes it, in plain torch.

    Raises:
        InputError: If a value is out of its range, or parameters of earlier tasks have shrunk.
    """

    name: ClassVar[str]
    penalty: Anchored

    def __init__(
        self, weight: float, *, samples: int | None, seed: int, first_task: bool = False
    ) -> None:
        super().__init__(weight, first_task=first_task)
        if samples is not None and samples < 1:
            raise InputError(f"samples={samples} of {type(self).__name__}; expected 1 or more")
        self.samples = samples
        self.seed = seed
        self._micro_batches = 0
        self._scale = 1.0  # of gradients when they were last added to

    @abstractmethod
    def add_gradients(self, module: L.LightningModule, factor: float) -> Tensor | None:
        """Add the gradient, times a factor; the penalty, or None where nothing is penalised."""

    @override
    def prepare_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        live, anchor = parameters_of(module), self.penalty.anchor
        check_grown(live, anchor, live.keys() & anchor.keys(), "the module")
        self.penalty.move_to(module.device)
        self._micro_batches = 0

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._micro_batches += 1

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Lightning divides every loss by the length of a whole accumulation, and so the last,
        # shorter one of an epoch counts less: the penalty in the loss would, too.
        share = self._micro_batches / trainer.accumulate_grad_batches
        self._micro_batches = 0
        self._scale = _gradient_scale(trainer, optimizer)
        if not share:
            return
        penalty = self.add_gradients(pl_module, share * self._scale)
        if penalty is not None:
            pl_module.log(f"{self.name}/penalty", penalty)

    @override
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # A fit with nothing left to train has taken its module off the device by now.
        self.penalty.move_to(module.device)
        super().end_task(trainer, module)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        # Lightning takes the module off its device too.
        self.penalty.move_to(torch.device("cpu"))


def extend_training_step(module: L.LightningModule, term: LossTerm) -> Callable[[], None]:
    """Add a term to the loss that a module's ``training_step`` returns.

    The term is computed where the step is: inside autocast and inside the forward of DDP, which
    therefore sees one graph. Lightning's division by the accumulation, its scaler and its backward
    treat the sum like any loss.

    Args:
        module: The module; this instance is extended, its class stays as it is.
        term: Makes a context manager that is entered before every step; what it gives is called
            after the step and returns what to add, a scalar.

    Returns:
        A function that takes the term away again.
    """
    step = vars(module).get("training_step")
    if not isinstance(step, _ExtendedStep):
        step = _ExtendedStep(module)
    step.terms.append(term)
    return functools.partial(step.take_away, term)


class _ExtendedStep:
    """Replaces a module's ``training_step`` while there are terms to add.

    Callbacks end in the order in which they began, so that wrappers around wrappers would be taken
    off from the inside.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.terms: list[LossTerm] = []
        self._module = module
        self._former = vars(module).get("training_step")
        self._original: Callable[..., Any] = module.training_step
        functools.update_wrapper(self, self._original)
        # Lightning looks under one decorator to see which arguments there are.
        self.__wrapped__ = getattr(self._original, "__wrapped__", self._original)
        vars(module)["training_step"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as watching:
            terms = [watching.enter_context(term()) for term in self.terms]
            output = self._original(*args, **kwargs)
        if output is None:  # Lightning skips the batch
            return None
        added = [term() for term in terms]
        if isinstance(output, dict):
            return output | {"loss": sum(added, output["loss"])}
        return sum(added, output)

    def take_away(self, term: LossTerm) -> None:
        self.terms.remove(term)
        if self.terms:
            return
        del vars(self._module)["training_step"]
        if self._former is not None:
            vars(self._module)["training_step"] = self._former


def _gradient_scale(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """By what the gradients are multiplied when ``on_before_optimizer_step`` fires.

    Lightning unscales before that hook, except for optimizers that do it themselves, fused ones.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
