"""Keep what every task changed, and evaluate with the merged weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.auto_scale import AutoScale, Loader
from cl_merge.callbacks.batches import Logits
from cl_merge.callbacks.best_weights import check_best, check_weights, load_best
from cl_merge.callbacks.chosen_scale import ChosenScale
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.callbacks.fisher import TaskFisher
from cl_merge.callbacks.others import attached, changed_by_others, is_kind
from cl_merge.callbacks.outputs import Loss
from cl_merge.callbacks.task import EvaluationCallback
from cl_merge.errors import InputError, task_name
from cl_merge.mergers import Merger
from cl_merge.mergers.registry import as_merger, chosen_options
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

    Works with any `LightningModule`, optimizer and precision, on one process, under DDP, where
    every rank folds the same weights, or ``ModelParallelStrategy``, where each folds its share. Use
    one instance for the whole stream, and a new `Trainer` per task. What is merged is what the fit
    leaves after ``on_train_end``, averages that callbacks put in too. Layers may be frozen and
    unfrozen, parameters may join and grow between tasks; see `StreamMerger`.

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
            ``"average"`` their mean over tasks. None is ``"trained"``, and warns of what moved.
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
        importance_samples: For methods that weigh elements: as ``samples`` of `EWC`, drawn labels.
        **options: Options of the method, such as ``density`` for TIES; a `Merger` has its own.

    Attributes:
        stream: What merges, in plain torch.

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
        merger = as_merger(method, options, type(self))
        self._scale = ChosenScale(scale, held_out, merger.published_scale)
        self._ends_in_steps = self._scale.chooses
        self.stream = StreamMerger(
            None,
            merger,
            scale=self._scale.given,
            start=start,
            buffers=buffers,
            left_out=left_out,
            include=include,
            exclude=exclude,
            store=store,
            directory=directory,
            device=device,
        )
        check_weights(weights)
        if merger.grams:
            raise InputError(
                f"'{merger.name}' needs Gram matrices of the inputs of layers, which "
                "MergeCallback does not collect; merge afterwards, from files: cl-merge merge "
                "--importance, or with StreamMerger.end_task(gram_matrices(model, batches))"
            )
        if importance_samples is not None and importance_samples < 1:
            raise InputError(f"importance_samples={importance_samples}; expected 1 or more")
        self._fisher = TaskFisher("MergeCallback", logits, loss, importance_samples)
        self._weights, self._save_state = weights, save_state
        self._has_start = False  # whether the weights are in that the task starts from
        self._verified = False  # whether an evaluation has been seen to have the merged weights

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
    def chosen(self) -> list[Scales]:
        """The scales that were chosen, one for each task, if the scale is chosen."""
        return self._scale.chosen

    @property
    @override
    def state_key(self) -> str:
        stream, options = self.stream, chosen_options(self.merger)
        include, exclude = list(stream.selection.include), list(stream.selection.exclude)
        chosen = {"options": options, "include": include, "exclude": exclude}
        chosen = {name: value for name, value in chosen.items() if value}
        return self._generate_state_key(method=self.merger.name, start=stream.start, **chosen)

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
        self._scale.check(names)

    def install(self, module: nn.Module) -> None:
        """Put the merged weights into a module, to stay; see `StreamMerger.install`."""
        self.stream.install(module)

    def reset(self) -> None:
        """Forget all tasks and the base, for a new stream."""
        self.stream.reset()
        self._scale.chosen = []

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != TrainerFn.FITTING:
            return
        _check_together(attached(trainer, MergeCallback))
        self.stream.module = pl_module
        # Before optimizers copy weights; but what `configure_model` makes is not there yet.
        self._has_start = self.base.keys() <= parameters_of(pl_module).keys()
        if self._has_start:
            self.stream.restore_start()

    @override
    def prepare_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        checkpoint = trainer.ckpt_path is not None
        if checkpoint and not self._save_state:
            raise InputError(
                "MergeCallback(save_state=False) cannot resume a checkpoint, which does not hold "
                "the weights that the task started from; expected save_state=True"
            )
        if self.merger.weighted and is_kind(trainer.strategy, "ModelParallelStrategy"):
            raise InputError(
                f"'{self.merger.name}' needs gradients of single samples, which sharded "
                "parameters do not have; use another method, or strategy='ddp'"
            )
        if self._weights == "best":
            check_best(trainer)
        self.stream.module = module
        self.stream.move_state_to(module.device)
        self._scale.prepare(trainer, module)
        # Weights from a checkpoint within a task are where that task stood, and stay.
        if (checkpoint or not self._has_start) and not self._resumed:
            self.stream.restore_start()
        if not self.base:
            self.check_names(n for n, p in parameters_of(module).items() if p.is_floating_point())

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        self.stream.move_state_to(module.device)  # which may have been restored since
        self.stream.note_base(resumed=self._resumed)
        if self.merger.weighted:
            self._fisher.check(trainer, module, batch)
        self._scale.try_batch(trainer, module, batch)

    @override
    def watch(self) -> None:
        self.stream.watch()

    @override
    def choose_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._weights == "best":
            load_best(trainer, module)

    @override
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stream, importance = self.stream, None
        if self.merger.weighted:
            live = parameters_of(module)
            merged = {name: live[name] for name in stream.model.merged_base()}
            importance = self._fisher.of(trainer, module, merged, seed=(self.tasks, 0))
        stream.end_task(importance)
        self._scale.choose(stream, trainer, module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._began and isinstance(exception, KeyboardInterrupt):
            log.warning(
                "%s was interrupted and is not merged; go on with fit(..., ckpt_path=...), or "
                "merge what it has trained: MergeCallback.stream.end_task()",
                task_name(self.tasks),
            )

    @override
    def begin_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        several = [c for c in attached(trainer, MergeCallback) if c.has_result]
        if len(several) > 1:
            raise InputError(
                f"this Trainer has {len(several)} MergeCallbacks, but an evaluation can see the "
                "weights of one only; evaluate them one after another: L.Trainer(callbacks=[one])"
            )
        stream, self._verified = self.stream, False
        stream.module = module
        stream.move_state_to(module.device)
        if self._unfinished:
            self._end_task_of_checkpoint()
        elif trainer.ckpt_path and not self._loaded and not stream.holds_trained():
            raise InputError(
                f"the checkpoint '{trainer.ckpt_path}' was written without the state of this "
                "MergeCallback, so its weights cannot be merged with the tasks before; load them "
                "into the module where training ends: MergeCallback(weights='best')"
            )
        stream.swap_in()

    @override
    def check_evaluation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._verified and (changed := self.stream.changed()):
            raise changed_by_others(trainer, module, self, changed)
        self._verified = True

    @override
    def end_evaluation(
        self, trainer: L.Trainer, module: L.LightningModule, *, failed: bool
    ) -> None:
        changed = self.stream.swap_out()
        if changed and not failed:
            raise changed_by_others(trainer, module, self, changed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self._save_state else {}

    @override
    def backup(self) -> Callable[[], None]:
        restore, chosen = self.stream.backup(), list(self.chosen)

        def undo() -> None:
            restore()
            self._scale.chosen = chosen

        return undo

    @override
    def task_state(self) -> dict[str, Any]:
        return self.stream.state_dict() | {"chosen": [scales.plain() for scales in self.chosen]}

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self._scale.load(state.get("chosen", []), self.stream)

    def _end_task_of_checkpoint(self) -> None:
        """Fold the task in which a checkpoint was written, whose weights the module holds."""
        if self.merger.weighted:
            raise InputError(
                f"the checkpoint was written within {task_name(self.tasks)}, of which "
                f"'{self.merger.name}' does not know yet how much each element matters; evaluate "
                "after the fit, without ckpt_path"
            )
        with torch.inference_mode(False):
            self.stream.end_task(write=False)
        self._scale.recall(self.stream)


def _check_together(every: Sequence[MergeCallback]) -> None:
    """Refuse several in a fit that put in other weights where a task starts or ends."""
    starts, weights = [c.stream.start for c in every], [c._weights for c in every]
    if len(every) > 1 and (len(set(starts)) > 1 or "merged" in starts):
        raise InputError(
            f"this Trainer has {len(every)} MergeCallbacks, with start {', '.join(starts)}; "
            "expected all sequential, or all independent"
        )
    if len(set(weights)) > 1:
        raise InputError(
            f"this Trainer has {len(every)} MergeCallbacks, with weights {', '.join(weights)}; "
            "expected all last, or all best"
        )
