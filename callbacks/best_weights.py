"""The best weights of a fit, as Lightning's `ModelCheckpoint` keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from cl_merge.callbacks.others import is_kind
from cl_merge.errors import InputError, unknown_name
from cl_merge.storage.unpickling import read_without_code

_WEIGHTS = ("last", "best")
_CHOOSE_LAST = "or choose weights='last'"


def check_weights(weights: str) -> None:
    """Refuse a choice of weights that is none."""
    if weights not in _WEIGHTS:
        raise unknown_name("choice of weights", weights, _WEIGHTS)


def check_best(trainer: L.Trainer) -> None:
    """Refuse a fit that will leave no best weights, or may leave those of another task."""
    if is_kind(trainer.strategy, "ModelParallelStrategy"):
        raise InputError(
            "MergeCallback(weights='best') reads a checkpoint in one file, which sharded "
            "parameters do not have; choose weights='last', or strategy='ddp'"
        )
    best = _best_checkpoint(trainer)
    if best.best_model_path and trainer.ckpt_path is None:
        raise InputError(
            "this ModelCheckpoint has been through the task before, whose best weights it still "
            "holds; make a new ModelCheckpoint for each task"
        )
    if best.save_top_k == 0:
        raise InputError(
            f"ModelCheckpoint(monitor='{best.monitor}', save_top_k=0) saves no best weights for "
            f"MergeCallback(weights='best'); expected save_top_k=1, {_CHOOSE_LAST}"
        )


def load_best(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Put the weights of a fit's best checkpoint into the module."""
    # Lightning saves nothing in such a fit; it sets the attribute where type checkers do not look.
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    best = _best_checkpoint(trainer)
    if not best.best_model_path:
        raise InputError(
            f"ModelCheckpoint(monitor='{best.monitor}') has saved no best weights in this fit for "
            f"MergeCallback(weights='best'); let it save, {_CHOOSE_LAST}"
        )
    # Lightning's checkpoints may hold anything as hyperparameters.
    state = read_without_code(Path(best.best_model_path))["state_dict"]
    module.load_state_dict(state, strict=module.strict_loading)


def _best_checkpoint(trainer: L.Trainer) -> Any:
    """The first `ModelCheckpoint` of a trainer that monitors something, or `InputError`."""
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "monitor", None) is not None:
            return checkpoint
    raise InputError(
        "MergeCallback(weights='best') found no best checkpoint; add a "
        f"ModelCheckpoint(monitor=...) to the Trainer, {_CHOOSE_LAST}"
    )
