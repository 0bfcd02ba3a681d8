"""Which tensors of which files are merged; every mismatch shows here, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.merge_files.grown import GrownVector, is_grown
from cl_merge.storage import Weights
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import check_same_dtypes, check_same_layout


@dataclass(frozen=True)
class Plan:
    """What will be merged."""

    base: Weights  # before fine-tuning
    tasks: list[Weights]  # fine-tuned weights or task vectors, in order
    importances: list[Weights]  # one for each task, or none
    merged: list[str]  # names of tensors, in the order of the base
    copied: list[str]  # names of the others, which are taken from the base


def make_plan(
    base: Weights,
    tasks: Sequence[Weights],
    selection: Selection,
    importances: Sequence[Weights] = (),
) -> Plan:
    """Check every input against the base, by what the files say of their tensors.

    Raises:
        InputError: If there is no task, or names, shapes or dtypes do not match; names the file and
            the tensors.
    """
    if not tasks:
        raise InputError("no task to merge; give at least one checkpoint or task vector")
    check_base(base)
    if is_grown(base):
        tasks = [GrownVector(task, base) if task.is_task_vector else task for task in tasks]
    changed: list[set[str]] = []
    for task in tasks:
        _check_task(task, base)
        changed.append(set(selection.names(floating(task))))
        if changed[-1] != changed[0]:
            raise InputError(
                f"'{task.path}' changes other tensors than '{tasks[0].path}'; missing: "
                f"{listing(sorted(changed[0] - changed[-1]))}; extra: "
                f"{listing(sorted(changed[-1] - changed[0]))}. Choose those of both with include"
            )
    if not changed[0]:
        raise InputError(f"nothing to merge: '{tasks[0].path}' holds no floating-point tensor")
    merged = [name for name in base.names if name in changed[0]]
    copied = [name for name in base.names if name not in changed[0]]
    for importance in importances:
        _check_importance(importance, base, merged)
    return Plan(base, list(tasks), list(importances), merged, copied)


def dtype_name(weights: Weights, name: str) -> str:
    """Name the dtype of a tensor as users know it, as in ``"float32"``."""
    return str(weights.dtype(name)).removeprefix("torch.")


def check_base(base: Weights) -> None:
    """Refuse a task vector where weights are wanted."""
    if base.is_task_vector:
        raise InputError(
            f"'{base.path}' is a task vector, but the base must hold the weights before fine-tuning"
        )


def floating(weights: Weights) -> list[str]:
    """Names of the floating-point tensors, in the order of the checkpoint."""
    return [name for name in weights.names if weights.dtype(name).is_floating_point]


def _check_task(task: Weights, base: Weights) -> None:
    theirs, ours = _layout(task), _layout(base)
    named, than = f"'{task.path}'", f"the base '{base.path}'"
    check_same_layout(theirs, ours, named, than, partly=task.is_task_vector)
    if not task.is_task_vector:
        check_same_dtypes(theirs, ours, named, than)
        return
    integers = [name for name in task.names if not base.dtype(name).is_floating_point]
    if integers:
        raise InputError(
            f"{named} changes tensors that {than} has as integers: {listing(integers)}. It must be "
            "the model that the task vector was made with"
        )


def _check_importance(importance: Weights, base: Weights, merged: list[str]) -> None:
    has, layout = _layout(importance), _layout(base)
    missing = [name for name in merged if name not in has]
    if missing:
        raise InputError(
            f"the importance '{importance.path}' lacks tensors that are merged: {listing(missing)}"
        )
    given, wanted = {n: has[n] for n in merged}, {n: layout[n] for n in merged}
    check_same_layout(given, wanted, f"'{importance.path}'", f"the base '{base.path}'")


def _layout(weights: Weights) -> dict[str, Tensor]:
    """Tensors of a checkpoint's names, shapes and dtypes that hold nothing."""
    return {
        name: torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta")
        for name in weights.names
    }
