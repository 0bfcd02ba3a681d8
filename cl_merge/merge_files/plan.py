"""Which tensors of which files are merged; every mismatch shows here, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cl_merge.errors import InputError, listing
from cl_merge.storage import Weights
from cl_merge.task_vectors.selection import Selection


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
    merged = changed[0]
    if not merged:
        raise InputError(f"nothing to merge: '{tasks[0].path}' holds no floating-point tensor")
    for importance in importances:
        _check_importance(importance, base, merged)
    return Plan(
        base,
        list(tasks),
        list(importances),
        [name for name in base.names if name in merged],
        [name for name in base.names if name not in merged],
    )


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
    ours, theirs = set(base.names), set(task.names)
    missing = [] if task.is_task_vector else [name for name in base.names if name not in theirs]
    extra = [name for name in task.names if name not in ours]
    if missing or extra:
        raise InputError(
            f"'{task.path}' has other tensors than the base '{base.path}'; missing: "
            f"{listing(missing)}; extra: {listing(extra)}.{_prefix_hint(task, base)} Both must "
            "come from one architecture"
        )
    _check_shapes(task, base)
    integers = [name for name in task.names if not base.dtype(name).is_floating_point]
    if task.is_task_vector and integers:
        raise InputError(
            f"'{task.path}' changes tensors that the base '{base.path}' has as integers: "
            f"{listing(integers)}. It must be the model that the task vector was made with"
        )
    dtypes = [
        f"{name} {dtype_name(task, name)} instead of {dtype_name(base, name)}"
        for name in task.names
        if task.dtype(name) != base.dtype(name)
    ]
    if dtypes and not task.is_task_vector:
        raise InputError(
            f"'{task.path}' has other dtypes than the base '{base.path}': {listing(dtypes)}. "
            "Convert one of the two"
        )


def _check_importance(importance: Weights, base: Weights, merged: set[str]) -> None:
    has = set(importance.names)
    missing = [name for name in base.names if name in merged and name not in has]
    if missing:
        raise InputError(
            f"the importance '{importance.path}' lacks tensors that are merged: {listing(missing)}"
        )
    _check_shapes(importance, base)


def _check_shapes(weights: Weights, base: Weights) -> None:
    known = set(base.names)
    shapes = [
        f"{name} {tuple(weights.shape(name))} instead of {tuple(base.shape(name))}"
        for name in weights.names
        if name in known and weights.shape(name) != base.shape(name)
    ]
    if shapes:
        raise InputError(
            f"'{weights.path}' has other shapes than the base '{base.path}': {listing(shapes)}"
        )


def _prefix_hint(task: Weights, base: Weights) -> str:
    """Tell if names differ by a prefix only, the usual mark of a wrapper around the model."""
    for wrapped, bare in ((task, base), (base, task)):
        for name in wrapped.names[:1]:
            for short in bare.names:
                prefix = name.removesuffix(short)
                if prefix != name and {prefix + n for n in bare.names} == set(wrapped.names):
                    return (
                        f" Names in '{wrapped.path}' begin with '{prefix}': save both in one way."
                    )
    return ""
