"""Who else is in a trainer: callbacks of ours and of others, which may change weights too."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from cl_merge.errors import InputError, listing, task_name, unknown_name
from cl_merge.mergers import Merger
from cl_merge.storage.unpickling import read_without_code

_Kind = TypeVar("_Kind", bound=Callback)

WEIGHTS = ("last", "best")

_PACKAGES = ("lightning", "pytorch_lightning")
_STAGES = ("test", "validation", "predict")
_MOMENTS = ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")

AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")
"""Lightning's callbacks that put other weights into the module when training ends."""

NOT_RESUMED = (
    "MergeCallback(save_state=False) cannot resume a checkpoint, which does not hold the weights "
    "that the task started from; expected save_state=True"
)
INTERRUPTED = (
    "%s was interrupted and is not merged; go on with fit(..., ckpt_path=...), or merge what it "
    "has trained: MergeCallback.stream.end_task()"
)


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """All callbacks of a trainer, in its order."""
    # Lightning's connector sets it, which type checkers do not see.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def attached(trainer: L.Trainer, *kinds: type[_Kind]) -> list[_Kind]:
    """The callbacks of a trainer that are of one of the classes, in its order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kinds)]


def runs_after(trainer: L.Trainer, one: Callback, other: Callback) -> bool:
    """Whether hooks of one callback of a trainer fire after those of the other."""
    callbacks = callbacks_of(trainer)
    return callbacks.index(one) > callbacks.index(other)


def is_kind(thing: object, *names: str) -> bool:
    """Whether something is of a Lightning class of one of these names, of whichever package.

    ``lightning`` and ``pytorch_lightning`` have two sets of classes.
    """
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] in _PACKAGES
        for kind in type(thing).__mro__
    )


def check_strategy(trainer: L.Trainer, name: str, *, can_shard: bool) -> None:
    """Refuse strategies under which a callback of this name cannot work."""
    strategy = trainer.strategy
    if is_kind(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        instead = "ModelParallelStrategy() with fully_shard in configure_model, or "
        raise RuntimeError(
            f"{name} cannot work with what {type(strategy).__name__} makes of parameters; use "
            f"{instead if can_shard else ''}strategy='ddp'"
        )
    if is_kind(strategy, "ModelParallelStrategy") and not can_shard:
        raise RuntimeError(
            f"{name} needs whole parameters on every rank, but {type(strategy).__name__} shards "
            "them; use strategy='ddp' or one device"
        )
    if is_kind(strategy.launcher, "_MultiProcessingLauncher"):
        raise RuntimeError(
            f"{name} keeps its state in the process, but spawned processes lose it when a fit "
            "ends; use strategy='ddp' and start the script from the command line"
        )


def check_arguments(merger: Merger, weights: str, samples: int | None) -> None:
    """Refuse what `MergeCallback` does not know, and methods that need what it does not collect."""
    if weights not in WEIGHTS:
        raise unknown_name("choice of weights", weights, WEIGHTS)
    if samples is not None and samples < 1:
        raise InputError(f"importance_samples={samples}; expected 1 or more")
    if merger.grams:
        raise InputError(
            f"'{merger.name}' needs Gram matrices of the inputs of layers, which MergeCallback "
            "does not collect; merge afterwards, from files: cl-merge merge --importance, or with "
            "StreamMerger.end_task(gram_matrices(model, batches))"
        )


def told_apart(
    merger: Merger, start: str, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Any]:
    """What tells several `MergeCallback` apart: method and start, and what else is no default."""
    known = inspect.signature(type(merger)).parameters
    options = {n: value for n, value in merger.options.items() if value != known[n].default}
    chosen = {"options": options, "include": [*include], "exclude": [*exclude]}
    return {"method": merger.name, "start": start, **{k: v for k, v in chosen.items() if v}}


def check_fit(trainer: L.Trainer, merger: Merger, weights: str) -> None:
    """Refuse fits in which `MergeCallback` cannot do what it is to do when they end."""
    if not is_kind(trainer.strategy, "ModelParallelStrategy"):
        if weights == "best":
            _check_best(trainer)
        return
    if merger.weighted:
        raise InputError(
            f"'{merger.name}' needs gradients of single samples, which sharded parameters do not "
            "have; use another method, or strategy='ddp'"
        )
    if weights == "best":
        raise InputError(
            "MergeCallback(weights='best') reads a checkpoint in one file, which sharded "
            "parameters do not have; choose weights='last', or strategy='ddp'"
        )


def check_new(trainer: L.Trainer, used: Sequence[Callback]) -> None:
    """Refuse callbacks that were used in another task and would spoil this one."""
    for other in callbacks_of(trainer):
        if any(other is before for before in used):
            name = type(other).__name__
            raise InputError(
                f"this {name} has been through the task before, of which it remembers steps and "
                f"scores: it would undo or stop this task; make a new {name} for each task"
            )


def to_be_new(trainer: L.Trainer) -> list[Callback]:
    """The callbacks of a trainer that must be made anew for each task."""
    # An average remembers the step of its last update, averages nothing up to it, and ends the task
    # with the weights that it began with; early stopping waits for a score of another task.
    return [c for c in callbacks_of(trainer) if is_kind(c, *AVERAGES, "EarlyStopping")]


def check_alone(starts: Sequence[str], stage: str) -> None:
    """Refuse several `MergeCallback` of these starts that get in each other's way.

    Several may merge what one training changes, but only one can put its weights in.
    """
    several = f"this Trainer has {len(starts)} MergeCallbacks"
    if len(starts) > 1 and stage != "fit":
        raise InputError(
            f"{several}, but an evaluation can see the weights of one only; evaluate them one "
            "after another: L.Trainer(callbacks=[one])"
        )
    if len(starts) > 1 and (len(set(starts)) > 1 or "merged" in starts):
        raise InputError(
            f"{several}, with start {', '.join(starts)}; expected all sequential, or all "
            "independent"
        )


def load_best(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Put the weights of a fit's best checkpoint into the module."""
    best = _best_checkpoint(trainer)
    if not best.best_model_path:
        raise InputError(
            f"ModelCheckpoint(monitor='{best.monitor}') has saved no best weights in this fit for "
            "MergeCallback(weights='best'); let it save, or choose weights='last'"
        )
    # Lightning's checkpoints may hold anything as hyperparameters.
    state = read_without_code(Path(best.best_model_path))["state_dict"]
    module.load_state_dict(state, strict=module.strict_loading)


def check_importance_known(merger: Merger) -> None:
    """Refuse to evaluate a checkpoint of within a task with methods that weigh elements."""
    if merger.weighted:
        raise InputError(
            f"the checkpoint was written within {task_name(merger.tasks)}, of which "
            f"'{merger.name}' does not know yet how much each element matters; evaluate after the "
            "fit, without ckpt_path"
        )


def no_state_in(path: object) -> InputError:
    """Make the error for an evaluation of a checkpoint that cannot be merged."""
    return InputError(
        f"the checkpoint '{path}' was written without the state of this MergeCallback, so its "
        "weights cannot be merged with the tasks before; load them into the module where training "
        "ends: MergeCallback(weights='best')"
    )


def changed_by_others(
    trainer: L.Trainer, module: L.LightningModule, callback: Callback, changed: Sequence[str]
) -> InputError:
    """Make the error for weights that changed in an evaluation; names who may have done it."""
    hooks = [f"on_{stage}_{moment}" for stage in _STAGES for moment in _MOMENTS]
    others = [other for other in callbacks_of(trainer) if other is not callback]
    able = [type(o).__name__ for o in (*others, module) if any(_defines(o, h) for h in hooks)]
    who = f"{listing(able)} can do that" if able else "no callback can do that"
    return InputError(
        f"something changed the merged weights during the evaluation: {listing(changed)}. {who}; "
        "evaluate with L.Trainer(callbacks=[the MergeCallback]). The module has the weights that "
        "it had before"
    )


def _defines(thing: object, hook: str) -> bool:
    """Whether the class of a callback or module has a hook that may change weights."""
    home = next((kind for kind in type(thing).__mro__ if hook in vars(kind)), None)
    if home is None:
        return False
    return home.__module__.partition(".")[0] not in _PACKAGES or is_kind(thing, *AVERAGES)


def _check_best(trainer: L.Trainer) -> None:
    """Refuse a `ModelCheckpoint` whose best weights may be those of another task."""
    if _best_checkpoint(trainer).best_model_path and trainer.ckpt_path is None:
        raise InputError(
            "this ModelCheckpoint has been through the task before, whose best weights it still "
            "holds; make a new ModelCheckpoint for each task"
        )


def _best_checkpoint(trainer: L.Trainer) -> Any:
    """The first `ModelCheckpoint` of a trainer that monitors something, or `InputError`."""
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "monitor", None) is not None:
            return checkpoint
    raise InputError(
        "MergeCallback(weights='best') found no best checkpoint; add a "
        "ModelCheckpoint(monitor=...) to the Trainer, or choose weights='last'"
    )
