"""Learning without forgetting: stay close to what the model of the task before says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from cl_merge.callbacks.outputs import Loss, check_classes, check_loss, outputs_of
from cl_merge.callbacks.regularizer import Regularizer, extend_training_step
from cl_merge.callbacks.voting import text_head
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.models.zero_shot import ZeroShotHead
from cl_merge.task_vectors.growth import check_grown
from cl_merge.task_vectors.module_weights import (
    buffers_of,
    copies,
    evaluating,
    install,
    parameters_of,
    with_names_of,
)

Readout = Callable[[Any, Sequence[int] | None], Tensor]
"""Makes logits [B, K] of a module's output, for the K classes given, or for all it has."""


class LwF(Regularizer):
    """Distil the model after the previous task into the model in training, on the same batches.

    Each ``trainer.fit`` is a task. When one ends, its weights become the teacher. From then on
    ``weight * distillation(student, teacher)`` is added to the loss of every training step, over
    the classes of all earlier tasks, of a head that has grown its former outputs; where the target
    is called several times in a step, the mean over the calls. The teacher sees exactly the inputs
    that the distilled module was given, augmentation included, in evaluation mode. It is one copy
    of the parameters that train (and of buffers), run through the module's own code and kept
    outside of it: not in its ``state_dict``, its optimizer or DDP.

    Works with any module and loop under automatic optimisation, any precision, accumulation,
    clipping, and DDP; alone, with `MergeCallback` (LwF + MagMax) or with `EWC`. The added term is
    logged as ``lwf/loss``.

    Args:
        weight: Factor of the term.
        temperature: Softens both outputs.
        target: Name of the submodule whose output is distilled, such as ``"net"`` or
            ``"model.classifier"``. A `CLIPClassifier` needs none: its image encoder is distilled,
            through the head rows of the earlier classes.
        loss: What the outputs are trained with: ``"cross_entropy"`` for logits of classes,
            ``"binary_cross_entropy"`` for one label each, ``"mse"`` for numbers, of which the mean
            squared difference is taken. None is the first, and refuses a single output.
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
        loss: Loss | None = None,
        first_task: bool = False,
    ) -> None:
        super().__init__(weight, first_task=first_task)
        if not temperature > 0:
            raise InputError(f"temperature={temperature} of LwF; expected more than 0")
        if isinstance(cast(object, target), nn.Module):
            kind = type(target).__name__
            raise InputError(f"target of LwF is a module, {kind}; expected its name, as 'net'")
        self.temperature = temperature
        self.target = target
        check_loss(loss)
        self._readout, self._loss = readout, loss
        self._teacher: dict[str, Tensor] = {}
        self._classes: list[int] | None = None
        self._untried = False  # whether no output of the target has been read in this fit
        self._frozen: list[tuple[str, nn.Parameter]] = []  # of the target, which may train later
        self._extended = ExitStack()  # of the training step; closed at the end of a fit

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target)

    # Hooks, in the order in which they fire.

    @override
    def prepare_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        target = self._find_target(module)
        if getattr(module, "_compiler_ctx", None) is not None:
            name = self.target or "visual"
            raise InputError(
                f"LwF reads what '{name}' returns, which torch.compile of the whole module hides; "
                f"compile that part instead: module.{name} = torch.compile(module.{name})"
            )
        self._classes = _distilled_classes(trainer, first=self.tasks == 0)
        if self._teacher or self.first_task:
            step = partial(self._distilling, module)
            self._extended.callback(extend_training_step(module, step))
        else:
            # What makes outputs unreadable shows now, and not when a task has been trained.
            hook = target.register_forward_hook(partial(self._try_output, module))
            self._extended.callback(hook.remove)

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        target, self._untried = self._find_target(module), True
        if not self._teacher and self.first_task:
            self._teacher = copies(_changing(target))
        parameters = parameters_of(target)
        former = [name for name in self._teacher if name in parameters]
        if self._teacher and not former:
            raise InputError(
                f"LwF: '{self.target}' has none of the parameters of the task before; use a new LwF"
            )
        check_grown(parameters, self._teacher, former, f"'{self.target}'")
        self._teacher = {name: t.to(module.device) for name, t in self._teacher.items()}
        self._frozen = [(n, p) for n, p in parameters.items() if n not in self._teacher]

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._untried and not self._teacher and outputs is not None:
            raise self._not_called(pl_module)

    @override
    def remember(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        target = self._find_target(module)
        every = parameters_of(target) | buffers_of(target)
        # What trained in a task before may be frozen now.
        names = [name for name in every if name in self._teacher] + list(_changing(target))
        live = {name: every[name] for name in names}
        if _shapes(self._teacher) == _shapes(live):
            install(self._teacher, live)
        else:
            self._teacher = copies(live)
        self._frozen = []

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
        asked: list[Any] = []
        pairs: list[tuple[Any, Any]] = []

        # The teacher borrows the target's code, so these hooks fire for it too, without gradients.
        # It goes first: what the code keeps of a call beside its output shall be the student's.
        def ask(target: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            device = module.device.type
            # Older torch would give the student, from the cache, weights cast without a graph.
            precision = torch.autocast(
                device,
                torch.get_autocast_dtype(device),
                torch.is_autocast_enabled(device),
                cache_enabled=False,
            )
            with torch.no_grad(), evaluating(target), precision:
                teacher = with_names_of(target, self._teacher)
                # Copies, as the code may change its inputs in place.
                given = apply_to_collection(
                    (inputs, named), Tensor, Tensor.clone, allow_frozen=True
                )
                asked.append(functional_call(target, teacher, *given))

        def pair(target: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                pairs.append((output, asked.pop()))

        target = self._find_target(module)
        before = target.register_forward_pre_hook(ask, prepend=True, with_kwargs=True)
        after = target.register_forward_hook(pair)
        try:
            yield lambda: self._term(module, pairs)
        finally:
            before.remove()
            after.remove()

    def _term(self, module: L.LightningModule, pairs: list[tuple[Any, Any]]) -> Tensor:
        """The weighted distillation loss of what student and teacher put out, a scalar."""
        if not pairs:
            raise self._not_called(module)
        self._untried = False
        # Probabilities near zero need float32, whatever the precision of the module.
        with torch.autocast(module.device.type, enabled=False):
            losses = [self._distil(module, new, old) for new, old in pairs]
        term = self.weight * torch.stack(losses).mean()
        module.log("lwf/loss", term.detach())
        return term

    def _distil(self, module: L.LightningModule, new: Any, old: Any) -> Tensor:
        student, teacher = self._logits(module, new), self._logits(module, old)
        former = student[:, : teacher.shape[1]]  # the outputs that there were before
        return outputs_of(self._loss).distil(former, teacher, self.temperature)

    def _try_output(
        self, module: L.LightningModule, target: nn.Module, inputs: Any, output: Any
    ) -> None:
        """Read the first output of a task that is not regularized."""
        if self._untried and torch.is_grad_enabled():
            with torch.no_grad():
                check_classes(self._logits(module, output), None, self._loss, "LwF")
            self._untried = False

    def _not_called(self, module: L.LightningModule) -> InputError:
        return InputError(
            f"LwF: '{self.target}' was not called with gradients in training_step of "
            f"{type(module).__name__}; name the submodule that makes the outputs, and checkpoint "
            "activations with use_reentrant=False, if you do"
        )

    @override
    def watch(self) -> None:
        # The model of the task before had what is unfrozen within this one.
        joined = {name: p for name, p in self._frozen if p.requires_grad}
        if joined and self._teacher:
            self._teacher |= copies(joined)
            self._frozen = [(name, p) for name, p in self._frozen if name not in joined]

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
    trained = {name: p for name, p in parameters_of(target).items() if p.requires_grad}
    return trained | buffers_of(target)


def _distilled_classes(trainer: L.Trainer, *, first: bool) -> list[int] | None:
    """Labels of the classes of all earlier tasks, each once; those of the task itself if first."""
    data: Any = getattr(trainer, "datamodule", None)
    task = getattr(data, "task", None)
    if not isinstance(task, Task):  # such as a `TaskStream` has
        return None
    tasks = [task] if first else data.tasks[: task.index]
    return list(dict.fromkeys(label for task in tasks for label in task.classes)) or None


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _shape(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, Tensor) else type(output).__name__
