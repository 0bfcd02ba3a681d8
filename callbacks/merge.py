"""Keep what every task changed, and evaluate with the merged weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.auto_scale import AutoScale, Loader
from cl_merge.callbacks.batches import Logits
from cl_merge.callbacks.chosen_scale import as_choice, choose_scale
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.callbacks.fisher import task_importance, try_importance
from cl_merge.callbacks.others import (
    INTERRUPTED,
    NOT_RESUMED,
    attached,
    changed_by_others,
    check_alone,
    check_arguments,
    check_fit,
    check_importance_known,
    load_best,
    no_state_in,
    told_apart,
)
from cl_merge.callbacks.outputs import Loss, check_loss
from cl_merge.callbacks.task import EvaluationCallback
from cl_merge.errors import InputError, task_name
from cl_merge.mergers import Merger
from cl_merge.mergers.registry import as_merger
from cl_merge.stream_merger import StreamMerger
from cl_merge.task_vectors.module_weights import parameters_of
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.task_vector import TaskVector

log = logging.getLogger(__name__)


class MergeCallback(EvaluationCallback):
    """Merge the tasks that a module learns one after another.

    Each ``trainer.fit`` is a task. The base of a parameter is its value before it first moves. When
    a fit has ended without an exception, what it changed, the task vector, is folded into the
    merger; the memory it takes does not grow with the number of tasks. ``trainer.test``,
    ``trainer.validate`` and ``trainer.predict`` see the base plus `scale` times the merged task
    vector, and the trained weights are back, bit for bit, when they end or raise. Validation inside
    ``fit`` sees the weights being trained.

    Works with any `LightningModule`, any optimizer and precision, on one process, under DDP, where
    every rank folds the same weights, or ``ModelParallelStrategy``, where each folds its share. Use
    one instance for the whole stream, and a new `Trainer` per task. What is merged is what the fit
    leaves: averages that callbacks put in, or weights that the module switches to, by the end of
    ``on_train_end``.

    Layers may be frozen and unfrozen. Parameters may join between tasks, and grow new entries
    behind the former ones, as the head of a class-incremental model does: what is new has the value
    it is born with as its base, and counts as unchanged in the tasks before.

    Args:
        method: ``"magmax"``, another name that `cl_merge.get_merger` knows, or a fresh `Merger`
            or its class.
        scale: Factor of the merged task vector; None takes the one that the method was published
            with. A mapping from patterns on parameter names to numbers gives each layer its own:
            ``{"*attn*": 0.3, "*": 0.5}``, the first that fits, ``"*"`` last. ``"auto"`` chooses it
            after each task, on images held out of the training; see `AutoScale`. ``"drift"`` is
            the published one, but less where features would drift too far; see `DriftScale`.
        start: Where the training of a task starts: ``"sequential"`` at the weights that the last
            task left, ``"independent"`` at the base, ``"merged"`` at the merged model.
        weights: Which weights of a fit count: ``"last"``, those that it leaves, or ``"best"``,
            those of the best checkpoint of the first `ModelCheckpoint` with a ``monitor``, which
            the module then has.
        buffers: What floating-point buffers, such as batch-norm statistics, hold during evaluation:
            ``"trained"`` those of the last task, ``"base"`` those before any training,
            ``"average"`` their mean over tasks. None means ``"trained"``, with a warning that names
            the buffers that moved.
        left_out: What parameters that train but are left out hold during evaluation: ``"trained"``
            the values of the last task, ``"base"`` those before any training.
        include: Patterns on the names of the parameters to merge; none for all that train.
        exclude: Patterns on the names of those to leave out. Task vectors do not hold them; they
            may come and go.
        store: In how many bits task vectors are written: ``"float32"``, ``"bf16"``, ``"int8"``,
            ``"int4"`` or ``"int2"``. Each is folded as it comes back from the file, so that merging
            the files later gives the same, bit for bit.
        directory: Folder in which to write each task vector, as ``task0.safetensors`` and so on;
            for methods that weigh elements also ``importance0.safetensors``; once parameters have
            joined or grown, ``base.safetensors`` with their base, to merge the files with.
        device: Where the base and the merged vector are kept; None is where the module trains.
            ``"cpu"`` saves the memory of the other device.
        save_state: Whether checkpoints hold the base and all that is merged, to resume tasks from.
        held_out: For ``scale="auto"``: makes a loader of the held-out images of the tasks so far;
            None asks the trainer's data module for its ``held_out_dataloader()``.
        logits: For methods that weigh elements, such as ``"fisher"``: as of `EWC`.
        loss: For methods that weigh elements: as of `EWC`.
        importance_samples: For methods that weigh elements: estimate the diagonal Fisher from at
            most so many samples of a task, with labels drawn from the predictions; None uses all.
        **options: Options of the method, such as ``density`` for TIES; a `Merger` has its own.

    Attributes:
        stream: What merges, in plain torch.
        chosen: The scales that were chosen, one for each task, if the scale is chosen.

    Raises:
        InputError: If the method, an option, a pattern or a value is wrong, a task vector is not
            finite, a parameter that is merged has gone or shrunk, there are no held-out images to
            choose the scale on, something else changes the weights of an evaluation, or a second
            `MergeCallback` of the trainer starts tasks elsewhere or would put in other weights.
        RuntimeError: Under a strategy that spawns processes, or that shards parameters in another
            way than ``ModelParallelStrategy``.

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

    can_shard = True

    def __init__(
        self,
        method: str | Merger | type[Merger] = "magmax",
        *,
        scale: float | Mapping[str, float] | str | AutoScale | DriftScale | None = None,
        start: str = "sequential",
        weights: str = "last",
        buffers: str | None = None,
        left_out: str = "trained",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        store: str = "float32",
        directory: str | Path | None = None,
        device: str | torch.device | None = None,
        save_state: bool = True,
        held_out: Loader | None = None,
        logits: Logits | None = None,
        loss: Loss | None = None,
        importance_samples: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._choice = as_choice(scale)
        self.stream = StreamMerger(
            None,
            as_merger(method, options, type(self)),
            scale=None if self._choice else scale,  # type: ignore[arg-type]  # checked there
            start=start,
            buffers=buffers,
            left_out=left_out,
            include=include,
            exclude=exclude,
            store=store,
            directory=directory,
            device=device,
        )
        if held_out is not None and not isinstance(self._choice, AutoScale):
            raise InputError(f"held_out is for scale='auto', but the scale is {self.scale}")
        check_arguments(self.merger, weights, importance_samples)
        self._told_apart = told_apart(self.merger, start, include, exclude)
        self.chosen: list[Scales] = []
        self._weights, self._save_state = weights, save_state
        self._held_out = held_out
        check_loss(loss)
        self._importance: Any = {"logits": logits, "loss": loss, "samples": importance_samples}
        self._has_start = False  # whether the weights are in that the task starts from
        # What a checkpoint that is evaluated holds, and whether it is of within a task.
        self._checkpoint: tuple[StreamMerger, bool] | None = None
        self._evaluated: StreamMerger | None = None  # during an evaluation
        self._verified = False

    @property
    @override
    def tasks(self) -> int:
        """Number of tasks folded so far."""
        return self.stream.tasks

    @property
    def merger(self) -> Merger:
        """What has folded the tasks so far."""
        return self.stream.merger

    @property
    def base(self) -> dict[str, Tensor]:
        """The weights before they first moved, by parameter name."""
        return self.stream.base

    @property
    def base_buffers(self) -> dict[str, Tensor]:
        """The floating-point buffers before any training, by name."""
        return self.stream.base_buffers

    @property
    def scale(self) -> float | dict[str, float]:
        """The scale in use, a number or numbers by pattern; may be set between evaluations."""
        return self.stream.scales.plain()

    @scale.setter
    def scale(self, value: float | Mapping[str, float]) -> None:
        self.stream.scales = Scales.read(value, self.merger.published_scale)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(**self._told_apart)

    @property
    @override
    def _legacy_state_key(self) -> str:  # type: ignore[override]  # as it was without options
        return self._generate_state_key(method=self.merger.name, start=self.stream.start)

    def merged(self) -> TaskVector:
        """The merged task vector of the tasks so far, float32 by parameter name."""
        return self.stream.merged()

    def task_vector(self, module: nn.Module) -> TaskVector:
        """The difference of a module's weights to the base; see `StreamMerger.task_vector`."""
        return self.stream.task_vector(module)

    def check_names(self, names: Iterable[str]) -> None:
        """Make sure that all patterns fit names of parameters, or raise `InputError`."""
        names = list(names)
        self.stream.check_names(names)
        if self._choice is not None:
            self._choice.check(names)

    def install(self, module: nn.Module) -> None:
        """Put the merged weights into a module, to stay; see `StreamMerger.install`."""
        self.stream.install(module)

    def reset(self) -> None:
        """Forget all tasks and the base, for a new stream."""
        self.stream.reset()
        self.chosen = []

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._checkpoint = None
        check_alone([c.stream.start for c in attached(trainer, MergeCallback)], stage)
        if stage != TrainerFn.FITTING:
            return
        self.stream.module = pl_module
        # Before optimizers copy weights; but what `configure_model` makes is not there yet.
        self._has_start = self.base.keys() <= parameters_of(pl_module).keys()
        if self._has_start:
            self.stream.restore_start()

    @override
    def prepare_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        checkpoint = trainer.ckpt_path is not None
        if checkpoint and not self._save_state:
            raise InputError(NOT_RESUMED)
        check_fit(trainer, self.merger, self._weights)
        self.stream.module = module
        self.stream.move_state_to(module.device)
        if self._choice is not None:
            self._choice.prepare(trainer, module, self._held_out)
        # Weights from a checkpoint within a task are where that task stood, and stay.
        if (checkpoint or not self._has_start) and not self._resumed:
            self.stream.restore_start()
        if not self.base:
            floating = [n for n, p in parameters_of(module).items() if p.is_floating_point()]
            self.check_names(floating)

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        self.stream.move_state_to(module.device)  # which may have been restored since
        self.stream.note_base(resumed=self._resumed)
        if self.merger.weighted:
            try_importance(trainer, module, batch, **self._importance)
        if isinstance(self._choice, DriftScale):
            self._choice.try_batch(trainer, module, batch)

    @override
    def watch(self) -> None:
        self.stream.watch()

    @override
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stream, importance = self.stream, None
        if self._weights == "best":
            load_best(trainer, module)
        if self.merger.weighted:
            importance = task_importance(
                trainer, module, stream.model.merged_base(), task=self.tasks, **self._importance
            )
        if self._choice is None:
            stream.end_task(importance)
            return
        undo = self.backup()
        try:
            stream.end_task(importance)
            stream.scales = choose_scale(self._choice, stream, trainer, module, self._held_out)
        except BaseException:
            undo()
            raise
        self.chosen.append(stream.scales)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._began and isinstance(exception, KeyboardInterrupt):
            log.warning(INTERRUPTED, task_name(self.tasks))

    @property
    @override
    def has_result(self) -> bool:
        return self.tasks > 0 or self._checkpoint is not None

    @override
    def begin_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stream, self._verified = self.stream, False
        if self._checkpoint is not None:
            stream, in_task = self._checkpoint
        stream.module = module
        stream.move_state_to(module.device)
        if self._checkpoint is not None and in_task:
            # The weights that were loaded are those of the task.
            check_importance_known(self.merger)
            with torch.inference_mode(False):
                stream.end_task(write=False)
        elif self._checkpoint is None and trainer.ckpt_path and not stream.holds_trained():
            raise no_state_in(trainer.ckpt_path)
        self._evaluated = stream
        stream.swap_in()

    @override
    def check_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._evaluated is None or self._verified:
            return
        changed, self._verified = self._evaluated.changed(), True
        if changed:
            raise changed_by_others(trainer, module, self, changed)

    @override
    def end_evaluation(
        self, trainer: L.Trainer, module: L.LightningModule, *, failed: bool
    ) -> None:
        stream, self._evaluated, self._checkpoint = self._evaluated, None, None
        changed = stream.swap_out() if stream is not None else []
        if changed and not failed:
            raise changed_by_others(trainer, module, self, changed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self._save_state else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = self._trainer_state
        if state.status != TrainerStatus.RUNNING or state.fn == TrainerFn.FITTING:
            super().load_state_dict(state_dict)
            return
        # An evaluation of a checkpoint sees what that holds, and leaves what is known as it is.
        loaded = self.stream.fresh()
        loaded.load_state_dict(state_dict)
        chosen = [Scales.read(scale, 0.0) for scale in state_dict.get("chosen", [])]
        loaded.scales = chosen[-1] if chosen else loaded.scales
        self._checkpoint = (loaded, state_dict["in_task"])
        if not self.base:
            self.stream, self.chosen = loaded, chosen

    @override
    def backup(self) -> Callable[[], None]:
        restore, chosen = self.stream.backup(), list(self.chosen)

        def undo() -> None:
            restore()
            self.chosen = chosen

        return undo

    @override
    def task_state(self) -> dict[str, Any]:
        return self.stream.state_dict() | {"chosen": [scales.plain() for scales in self.chosen]}

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self.chosen = [Scales.read(scale, 0.0) for scale in state.get("chosen", [])]
        if self._choice is not None and self.chosen:
            self.stream.scales = self.chosen[-1]
