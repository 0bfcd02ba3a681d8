"""Who else is in a trainer: callbacks of ours and of others, which may change weights too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from cl_merge.errors import InputError, listing

_Kind = TypeVar("_Kind", bound=Callback)

_PACKAGES = ("lightning", "pytorch_lightning")
_STAGES = ("test", "validation", "predict")
_MOMENTS = ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")

AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")
"""Lightning's callbacks that put other weights into the module when training ends."""


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """All callbacks of a trainer, in its order."""
    # Lightning's connector sets it, which type checkers do not see.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def attached(trainer: L.Trainer, *kinds: type[_Kind]) -> list[_Kind]:
    """The callbacks of a trainer that are of one of the classes, in its order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kinds)]


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
