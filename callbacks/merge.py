"""Keep what every task changed, and evaluate with the merged weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.auto_scale import AutoScale, Loader, held_out_batches
from cl_merge.callbacks.fisher import task_importance
from cl_merge.callbacks.task import WEIGHT_AVERAGING, EvaluationCallback, attached
from cl_merge.errors import InputError, listing, task_name, unknown_name
from cl_merge.mergers import Average, Merger
from cl_merge.mergers.registry import as_merger
from cl_merge.mergers.stack import StackMerger
from cl_merge.storage.files import save_tensors
from cl_merge.storage.quantize import check_store, stored
from cl_merge.task_vectors.module_weights import (
    check_same_parameters,
    copies,
    floating_buffers,
    install,
    trained_parameters,
)
from cl_merge.task_vectors.scales import Scales, scaled
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import TaskVector, check_same_layout

log = logging.getLogger(__name__)

STARTS = ("sequential", "independent", "merged")
BUFFERS = ("trained", "base", "average")


class MergeCallback(EvaluationCallback):
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
        method: ``"magmax"``, another name that `cl_merge.get_merger` knows, or a fresh `Merger`
            or its class.
        scale: Factor of the merged task vector; None takes the one that the method was published
            with. A mapping from patterns on parameter names to numbers gives each layer its own:
            ``{"*attn*": 0.3, "*": 0.5}``, the first that fits counts. ``"auto"`` chooses it after
            each task, on images that were held out of the training; see `AutoScale`.
        start: Where the training of a task starts: ``"sequential"`` at the weights that the last
            task left, ``"independent"`` at the base, ``"merged"`` at the merged model.
        buffers: What floating-point buffers, such as batch-norm statistics, hold during evaluation:
            ``"trained"`` those of the last task, ``"base"`` those before any training,
            ``"average"`` their mean over tasks. None means ``"trained"``, with a warning that names
            the buffers that moved.
        include: Patterns on the names of the parameters to merge; none for all that train.
        exclude: Patterns on the names of those to leave out. Task vectors do not hold what is left
            out, and evaluation shows its base values, whatever training did to it.
        store: In how many bits task vectors are written: ``"float32"``, ``"bf16"``, ``"int8"``,
            ``"int4"`` or ``"int2"``. Each is folded as it comes back from the file, so that merging
            the files later gives the same, bit for bit.
        directory: Folder in which to write each task vector, as ``task0.safetensors`` and so on;
            for methods that weigh elements also ``importance0.safetensors``.
        device: Where the base and the merged vector are kept; None is where the module trains.
            ``"cpu"`` saves the memory of the other device.
        held_out: For ``scale="auto"``: makes a loader of the held-out images of the tasks so far;
            None asks the trainer's data module for its ``held_out_dataloader()``.
        importance_samples: For methods that weigh elements, such as ``"fisher"``: estimate the
            diagonal Fisher, which is the importance, from at most so many samples of a task, one
            backward pass each; None uses all. As in `EWC` logits are the module's ``task_logits``
            if it has them, and labels are drawn from its predictions.
        **options: Options of the method, such as ``density`` for TIES; a `Merger` has its own.

    Attributes:
        tasks: Number of tasks folded so far.
        base: The weights before any training, by parameter name.
        base_buffers: The floating-point buffers before any training, by name.
        scales: The scale in use.
        chosen: The scales that were chosen, one for each task, if the scale is ``"auto"``.

    Raises:
        InputError: If the method, an option, a pattern or a value is wrong, a task vector is not
            finite, the parameters that train are not those of the first task, there are no
            held-out images to choose the scale on, or a second `MergeCallback` of the trainer
            starts tasks elsewhere or would put in other weights.
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
        method: str | Merger | type[Merger] = "magmax",
        *,
        scale: float | Mapping[str, float] | str | AutoScale | None = None,
        start: str = "sequential",
        buffers: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        store: str = "float32",
        directory: str | Path | None = None,
        device: str | torch.device | None = None,
        held_out: Loader | None = None,
        importance_samples: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
        if buffers is not None and buffers not in BUFFERS:
            raise unknown_name("choice of buffers", buffers, BUFFERS)
        self.merger = as_merger(method, options)
        self.start = start
        scale = AutoScale() if scale == "auto" else scale
        self._auto = scale if isinstance(scale, AutoScale) else None
        self.scales = Scales.read(None if self._auto else scale, self.merger.published_scale)
        self.chosen: list[Scales] = []
        self._selection = Selection(include, exclude)
        self._store = check_store(store)
        if held_out is not None and self._auto is None:
            raise InputError(f"held_out is for scale='auto', but the scale is {self.scale}")
        self._held_out = held_out
        if importance_samples is not None and importance_samples < 1:
            raise InputError(f"importance_samples={importance_samples}; expected 1 or more")
        self._importance_samples = importance_samples
        self.base: dict[str, Tensor] = {}
        self.base_buffers: dict[str, Tensor] = {}
        self._buffers = buffers
        self._buffer_average = Average()
        self._trained: dict[str, Tensor] | None = None  # during an evaluation
        self._directory = Path(directory) if directory is not None else None
        self._device = _checked_device(device)

    @property
    @override
    def tasks(self) -> int:
        """Number of tasks folded so far."""
        return self.merger.tasks

    @property
    def scale(self) -> float | dict[str, float]:
        """The scale in use: a number, or numbers by pattern."""
        return self.scales.plain()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=self.merger.name, start=self.start)

    def merged(self) -> TaskVector:
        """The merged task vector of the tasks so far, float32 by parameter name."""
        return self.merger.merged()

    def task_vector(self, module: nn.Module) -> TaskVector:
        """The difference of a module's weights to the base, of the parameters that are merged.

        Args:
            module: The module in training, or one with the same parameters.

        Returns:
            The task vector as it comes back from the store, float32 by parameter name, on `device`.

        Raises:
            InputError: If the parameters differ from those of the first task, or one is not finite.
        """
        names = self._selection.names(self.base)
        left_out = self.base.keys() - set(names)
        live = {n: p for n, p in trained_parameters(module).items() if n not in left_out}
        vector = TaskVector.between({name: self.base[name] for name in names}, live)
        return TaskVector(stored(vector, self._store))

    def check_names(self, names: Iterable[str]) -> None:
        """Make sure that all patterns fit names of what trains; a fit does this by itself.

        Raises:
            InputError: If a pattern fits none; names the nearest.
        """
        merged = self._selection.names(names)
        self.scales.check(merged)
        if self._auto is not None:
            self._auto.check(merged)

    def install(self, module: nn.Module) -> None:
        """Put the merged weights into a module, to stay.

        Args:
            module: The module that was trained, or one with the same parameters; they may be frozen
                meanwhile, of another precision, or the module compiled.

        Raises:
            InputError: If no task has been folded yet, or the module has not these parameters.
        """
        live = self._live(module)
        install(live, scaled(self.base, self.merger.items(), self.scales))
        install(live, self._evaluation_buffers())

    def move_state_to(self, device: torch.device) -> None:
        """Move the base, the merger and the buffers, unless a device was asked for.

        What comes from a checkpoint is on the CPU: it is loaded before the module is on its device.
        """
        if self._device is not None or next(iter(self.base.values())).device == device:
            return
        # An evaluation runs in inference mode, whose tensors are of no use to the next training.
        with torch.inference_mode(False):
            self._load(self.task_state(), device)

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        _check_alone(trainer, stage)

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, *, resumed: bool) -> None:
        live = trained_parameters(module)
        if not self.base:
            self.base = copies(live, self._device)
            self.base_buffers = copies(floating_buffers(module), self._device)
        check_same_parameters(self.base, live, "MergeCallback")
        self.move_state_to(module.device)
        self.check_names(self.base)
        if self._auto is not None:
            held_out_batches(trainer, self._held_out)  # if there are none, it shows before the work
        # Weights from a checkpoint within a task are where that task stood, and stay.
        if self.tasks and not resumed and self.start == "independent":
            install(live, self.base)
            install(floating_buffers(module), self.base_buffers)
        elif self.tasks and not resumed and self.start == "merged":
            self.install(module)

    @override
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        task = self.tasks
        try:
            vector = self.task_vector(module)
        except InputError as error:
            raise InputError(f"{task_name(task)}: {error}") from error
        importance = None
        if self.merger.weighted:
            fisher = task_importance(trainer, module, self._importance_samples, task)
            importance = {name: fisher[name].to(tensor.device) for name, tensor in vector.items()}
        self.merger.update(vector, importance)
        if task == 0:
            self._tell_memory(vector)
        self._fold_buffers(floating_buffers(module))
        if self._directory is not None and trainer.is_global_zero:
            vector.save(self._directory / f"task{task}.safetensors", store=self._store)
            if importance is not None:
                save_tensors(self._directory / f"importance{task}.safetensors", importance, {})
        if self._auto is not None:
            batches, changes = held_out_batches(trainer, self._held_out), dict(self.merger.items())
            self.scales = self._auto.choose(
                trainer, module, batches, self.base, changes, self._evaluation_buffers()
            )
            self.chosen.append(self.scales)

    @override
    def begin_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _check_average(trainer)
        self._trained = copies(self._live(module))
        self.move_state_to(module.device)
        self.install(module)

    @override
    def end_evaluation(self, module: L.LightningModule) -> None:
        if self._trained is not None:
            install(self._live(module), self._trained)
            self._trained = None

    @override
    def task_state(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "merger": self.merger.state_dict(),
            "base_buffers": self.base_buffers,
            "buffer_average": self._buffer_average.state_dict(),
            "chosen": [scales.plain() for scales in self.chosen],
        }

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        self._load(state, self._device)

    def _load(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        self.base = copies(state["base"], device)
        self.merger.load_state_dict(state["merger"], device)
        self.base_buffers = copies(state["base_buffers"], device)
        self._buffer_average.load_state_dict(state["buffer_average"], device)
        self.chosen = [Scales.read(scale, 0.0) for scale in state.get("chosen", [])]
        if self._auto is not None and self.chosen:
            self.scales = self.chosen[-1]

    def _fold_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take up the buffers that a task left, which are not merged."""
        base = self.base_buffers
        live = {name: buffers[name].to(before.device) for name, before in base.items()}
        moved = [name for name, before in base.items() if not torch.equal(live[name], before)]
        if self._buffers is None and moved:
            rank_zero_warn(
                f"{len(moved)} floating-point buffers moved during training and are not merged: "
                f"{listing(moved)}. Evaluation uses those of the last task; choose with "
                "MergeCallback(buffers='trained' | 'base' | 'average'), or freeze them"
            )
            self._buffers = "trained"
        if self._buffers == "average":
            self._buffer_average.update(live)

    def _evaluation_buffers(self) -> dict[str, Tensor]:
        """The buffers of an evaluation; none where they stay those of the last task."""
        if self._buffers == "base":
            return self.base_buffers
        return dict(self._buffer_average.items()) if self._buffers == "average" else {}

    def _live(self, module: nn.Module) -> dict[str, Tensor]:
        """What an evaluation changes: the parameters of the first task, and the buffers."""
        if self.tasks == 0:
            raise InputError("nothing to install: no task has been trained and merged yet")
        if not self.base:
            raise InputError(
                f"the Merger '{self.merger.name}' of MergeCallback has folded task vectors before, "
                "but the weights that they start from are not known until a fit; give a fresh one, "
                "or set MergeCallback.base, the weights before any training by name"
            )
        module = getattr(module, "_orig_mod", module)  # what `torch.compile` wraps
        live = dict(module.named_parameters())
        live = {name: live[name] for name in self.base if name in live}
        check_same_layout(live, self.base, "the module", "that of the first task")
        return live | floating_buffers(module)

    def _tell_memory(self, vector: TaskVector) -> None:
        if isinstance(self.merger, StackMerger):
            size, where = 4 * vector.numel() / 2**20, next(iter(vector.values())).device
            message = "method '%s' keeps every task vector in memory: %.1f MiB per task on %s"
            log.info(message, self.merger.name, size, where)


def _check_alone(trainer: L.Trainer, stage: str) -> None:
    """Several may merge what one training changes, but only one can put its weights in."""
    every = attached(trainer, MergeCallback)
    starts = [callback.start for callback in every]
    if len(every) > 1 and stage != TrainerFn.FITTING:
        raise InputError(
            f"this Trainer has {len(every)} MergeCallbacks, but an evaluation can see the weights "
            "of one only; evaluate them one after another: L.Trainer(callbacks=[one])"
        )
    if len(every) > 1 and (len(set(starts)) > 1 or "merged" in starts):
        raise InputError(
            f"this Trainer has {len(every)} MergeCallbacks, with start {', '.join(starts)}; "
            "expected all sequential, or all independent"
        )


def _check_average(trainer: L.Trainer) -> None:
    if trainer.state.fn != TrainerFn.VALIDATING:
        return
    for other in attached(trainer, *WEIGHT_AVERAGING):
        # From its fit on, it swaps weights in every validation, after this hook.
        if getattr(other, "_average_model", None) is not None:
            raise InputError(
                f"{type(other).__name__} would validate its average instead of what MergeCallback "
                "puts in; validate with a new Trainer without it: "
                "L.Trainer(callbacks=[the MergeCallback])"
            )


def _checked_device(device: str | torch.device | None) -> torch.device | None:
    try:
        return torch.device(device) if device is not None else None
    except RuntimeError as error:
        raise InputError(
            f"device={device}: no such device; expected as in 'cpu', 'cuda'"
        ) from error
