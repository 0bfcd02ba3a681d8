"""Learning without forgetting: stay close to what the model of the task before says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from cl_merge.callbacks.regularizer import Regularizer, extend_training_step
from cl_merge.callbacks.voting import text_head
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.models.zero_shot import ZeroShotHead
from cl_merge.task_vectors.module_weights import (
    check_same_parameters,
    copies,
    evaluating,
    install,
    trained_parameters,
)

Readout = Callable[[Any, Sequence[int] | None], Tensor]
"""Makes logits [B, K] of a module's output, for the K classes given, or for all it has."""

# Added to the new probabilities, divided by their number, as in the published runs.
_FLOOR = 1e-5


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Cross entropy between softened outputs of an old and a new model.

    With q and p the softmax of the teacher's and of the student's logits over `temperature`, the
    mean over the batch of ``-sum_k q_k log(p_k + 1e-5 / K)``. There is no factor of the squared
    temperature: this is the form of the published runs.

    Args:
        student: Logits of the new model, float [B, K].
        teacher: Logits of the old model, float [B, K].
        temperature: By what both are divided.

    Returns:
        A scalar, in nats.

    Example:
        >>> even = torch.zeros(1, 2)
        >>> round(float(distillation(even, even)), 3)
        0.693

    Reference:
        Li & Hoiem, Learning without Forgetting, ECCV 2016, equation 2.
    """
    new = F.softmax(student / temperature, dim=1)
    old = F.softmax(teacher / temperature, dim=1)
    return -(old * torch.log(new + _FLOOR / new.shape[1])).sum(dim=1).mean()


class LwF(Regularizer):
    """Distil the model after the previous task into the model in training, on the same batches.

    Each ``trainer.fit`` is a task. When one ends, its weights become the teacher. From then on
    ``weight * distillation(student, teacher)`` is added to the loss of every training step, over
    the classes of all earlier tasks. The teacher sees exactly the inputs that the distilled module
    was given, augmentation included, in evaluation mode. It is one copy of the parameters that
    train (and of buffers), run through the module's own code and kept outside of it: not in its
    ``state_dict``, its optimizer or DDP.

    Works with any module and loop under automatic optimisation, any precision, accumulation,
    clipping, and DDP; alone, with `MergeCallback` (LwF + MagMax) or with `EWC`. The added term is
    logged as ``lwf/loss``.

    Args:
        weight: Factor of the term.
        temperature: Softens both outputs.
        target: Name of the submodule whose output is distilled, such as ``"net"`` or
            ``"model.classifier"``. A `CLIPClassifier` needs none: its image encoder is distilled,
            through the head rows of the earlier classes.
        readout: Makes logits [B, K] of the target's output, given the earlier classes (a list of
            labels, or None if no `TaskStream` tells them). By default the output, or its
            ``logits``, is taken for logits [B, C], and the columns of the earlier classes are kept.
        first_task: Distil the weights before any training during the first task, over its own
            classes. The published runs train it freely.

    Raises:
        InputError: If the target is missing, unknown or not called in a training step, the whole
            module is compiled, or a value is out of its range.
        RuntimeError: Under manual optimisation, or a strategy that shards parameters or spawns
            processes.

    Example::

        callbacks = [LwF(target="net"), MergeCallback("magmax")]
        for loader in tasks:
            L.Trainer(max_epochs=3, callbacks=[*callbacks]).fit(module, loader)

    Reference:
        Li & Hoiem, Learning without Forgetting, ECCV 2016; weight and temperature: Marczak et al.,
        MagMax, ECCV 2024.
    """

    def __init__(
        self,
        weight: float = 0.3,
        *,
        temperature: float = 2.0,
        target: str | None = None,
        readout: Readout | None = None,
        first_task: bool = False,
    ) -> None:
        super().__init__(weight, first_task=first_task)
        if not temperature > 0:
            raise InputError(f"temperature={temperature} of LwF; expected more than 0")
        self.temperature = temperature
        self.target = target
        self._readout = readout
        self._teacher: dict[str, Tensor] = {}
        self._classes: list[int] | None = None
        self._extended = ExitStack()  # of the training step; closed at the end of a fit

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target)

    # Hooks, in the order in which they fire.

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, *, resumed: bool) -> None:
        target = self._find_target(module)
        if getattr(module, "_compiler_ctx", None) is not None:
            name = self.target or "visual"
            raise InputError(
                f"LwF reads what '{name}' returns, which torch.compile of the whole module hides; "
                f"compile that part instead: module.{name} = torch.compile(module.{name})"
            )
        if not self._teacher and self.first_task:
            self._teacher = copies(_changing(target))
        if not self._teacher:
            return
        check_same_parameters(self._teacher, _changing(target), "LwF")
        self._teacher = {name: t.to(module.device) for name, t in self._teacher.items()}
        self._classes = _distilled_classes(trainer, first=self.tasks == 0)
        self._extended.callback(extend_training_step(module, partial(self._distilling, module)))

    @override
    def remember(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        live = _changing(self._find_target(module))
        if self._teacher:
            install(self._teacher, live)
        else:
            self._teacher = copies(live)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._extended.close()
        # Lightning takes the module off its device too.
        self._teacher = {name: tensor.cpu() for name, tensor in self._teacher.items()}

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._extended.close()

    @override
    def task_state(self) -> dict[str, Any]:
        return {"tasks": self._tasks, "teacher": self._teacher}

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        self._tasks = state["tasks"]
        self._teacher = copies(state["teacher"])

    @contextmanager
    def _distilling(self, module: L.LightningModule) -> Iterator[Callable[[], Tensor]]:
        """Run the teacher on whatever the target is called with; gives what makes the term."""
        pairs: list[tuple[Any, Any]] = []

        def ask(target: nn.Module, inputs: tuple[Any, ...], named: Any, output: Any) -> None:
            # The teacher borrows the target's code, so this hook fires for its output too.
            if not torch.is_grad_enabled():
                return
            with torch.no_grad(), evaluating(target):
                pairs.append((output, functional_call(target, self._teacher, inputs, named)))

        hook = self._find_target(module).register_forward_hook(ask, with_kwargs=True)
        try:
            yield lambda: self._term(module, pairs)
        finally:
            hook.remove()

    def _term(self, module: L.LightningModule, pairs: list[tuple[Any, Any]]) -> Tensor:
        """The weighted distillation loss of what student and teacher put out, a scalar."""
        if not pairs:
            raise InputError(
                f"LwF: '{self.target}' was not called in training_step of "
                f"{type(module).__name__}; name the submodule that makes the outputs"
            )
        # Probabilities near zero need float32, whatever the precision of the module.
        with torch.autocast(module.device.type, enabled=False):
            losses = [
                distillation(self._logits(module, new), self._logits(module, old), self.temperature)
                for new, old in pairs
            ]
        term = self.weight * torch.stack(losses).sum()
        module.log("lwf/loss", term.detach())
        return term

    def _logits(self, module: L.LightningModule, output: Any) -> Tensor:
        """What is distilled of an output of the target, in float32 or better."""
        if self._readout is not None:
            return self._readout(output, self._classes)
        clip = _image_encoder_and_head(module)
        if clip is not None and self._find_target(module) is clip[0]:
            rows: Tensor = clip[1](output, self._classes)
            return rows
        logits = getattr(output, "logits", output)
        if not (isinstance(logits, Tensor) and logits.ndim == 2):
            raise InputError(
                f"LwF: '{self.target}' returns {_shape(logits)}; expected logits [batch, classes]: "
                "give LwF(readout=...), a function that makes them of this output"
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self._classes is None else logits[:, self._classes]

    def _find_target(self, module: L.LightningModule) -> nn.Module:
        if self.target is None and (clip := _image_encoder_and_head(module)):
            return clip[0]
        if not self.target:
            children = [name for name, _ in module.named_children()]
            raise InputError(
                f"LwF needs the name of the submodule of {type(module).__name__} whose output is "
                f"distilled: LwF(target=...), one of {listing(children, limit=8)} or a part of one"
            )
        try:
            return module.get_submodule(self.target)
        except AttributeError as error:
            names = [name for name, _ in module.named_modules() if name]
            raise unknown_name(
                f"submodule of {type(module).__name__}", self.target, names
            ) from error


def _image_encoder_and_head(module: nn.Module) -> tuple[nn.Module, ZeroShotHead] | None:
    """Both, of a module that has them where `CLIPClassifier` does."""
    visual, head = getattr(module, "visual", None), text_head(module)
    return (visual, head) if isinstance(visual, nn.Module) and head is not None else None


def _changing(target: nn.Module) -> dict[str, Tensor]:
    """What makes a teacher differ from the live module: trained parameters, and all buffers."""
    return {**trained_parameters(target), **dict(target.named_buffers())}


def _distilled_classes(trainer: L.Trainer, *, first: bool) -> list[int] | None:
    """Labels of the classes of all earlier tasks, each once; those of the task itself if first."""
    data: Any = getattr(trainer, "datamodule", None)
    task = getattr(data, "task", None)
    if not isinstance(task, Task):  # such as a `TaskStream` has
        return None
    tasks = [task] if first else data.tasks[: task.index]
    return list(dict.fromkeys(label for task in tasks for label in task.classes)) or None


def _shape(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, Tensor) else type(output).__name__
