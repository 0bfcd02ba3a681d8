"""Which tensors of which files are merged; every mismatch shows here, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.merge_files.contents import (
    check_mergeable,
    floating,
    is_buffer,
    is_twin,
)
from cl_merge.merge_files.grown import grown_vectors
from cl_merge.mergers.importances import check_importances, check_same_weighed
from cl_merge.storage import Weights
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import check_same_dtypes, check_same_layout

_BASE = "the base must hold the weights before fine-tuning"


@dataclass(frozen=True)
class Plan:
    """What will be merged."""

    base: Weights  # before fine-tuning; without a base, the first file once more, for all but sums
    tasks: list[Weights]  # fine-tuned weights or task vectors, in order
    importances: list[Weights]  # one for each task, or none
    merged: list[str]  # names of tensors, in the order of the base
    buffers: list[str]  # names of floating-point buffers, which are not merged but chosen
    copied: list[str]  # names of the others, which are taken from the base
    # Names of the base that are tied to one that is merged, by the name of that.
    twins: dict[str, list[str]]
    dtype: torch.dtype | None  # of what is written; None for the base's
    grams: bool  # whether importances are Gram matrices, of some of what is merged
    no_base: bool  # whether weights are merged as they are

    def is_added(self, task: Weights) -> bool:
        """Whether the values of a task are merged as they are, with no base to subtract."""
        return task.is_task_vector or self.no_base

    def written(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written."""
        own = self.base.dtype(name)
        return self.dtype if self.dtype is not None and own.is_floating_point else own


def make_plan(
    base: Weights,
    tasks: Sequence[Weights],
    selection: Selection,
    importances: Sequence[Weights],
    dtype: torch.dtype | None,
    *,
    grams: bool,
    no_base: bool,
    adapters: bool,
) -> Plan:
    """Check every input against the base, by what the files say of their tensors.

    Only what is merged has to match: parameters that the selection chooses, in names and shapes. Of
    tied parameters one suffices, and one is merged where all are stored.

    Raises:
        InputError: If an input is quantised, names or shapes do not match,
            a parameter is integers in one of them, or factors of LoRA would be merged without a
            base; names the file and the tensors.
    """
    # Without a base, adapters are changes all the same.
    for weights in () if no_base and adapters else (base, *(tasks if no_base else ())):
        check_base(weights, "without a base there must be weights" if no_base else _BASE)
    for weights in (base, *tasks):
        check_mergeable(weights)
    tasks = grown_vectors(tasks, base)
    chosen = Chosen(selection, [base, *tasks])
    changed: list[set[str]] = []
    twins: dict[str, str] = {}
    than = f"{'the first file' if no_base else 'the base'} '{base.path}'"
    for task in tasks:
        twins |= _check_task(task, base, chosen, than)
    for task in tasks:
        _check_tied(task, twins)
        changed.append(set(chosen.of(task)) - twins.keys())
        if not task.is_task_vector:
            changed[-1] &= set(base.names)
        if changed[-1] != changed[0]:
            raise InputError(
                f"'{task.path}' changes other tensors than '{tasks[0].path}'; missing: "
                f"{listing(sorted(changed[0] - changed[-1]))}; extra: "
                f"{listing(sorted(changed[-1] - changed[0]))}. Choose those of both with include"
            )
    if not changed[0]:
        among = (
            " among what include and exclude choose; include one that is named like a buffer by "
            "its whole name"
            if chosen.narrows
            else ""
        )
        raise InputError(
            f"nothing to merge: '{tasks[0].path}' holds no floating-point parameter{among}"
        )
    merged = [name for name in base.names if name in changed[0]]
    if no_base and not adapters:
        _check_factors(base, merged)
    if not base.is_task_vector:  # adapters tie no matrices, and a look at one costs a product
        twins |= _stored_twice([base, *tasks], merged)
        merged = [name for name in merged if name not in twins]
    done = {*merged, *twins}
    buffers = [name for name in floating(base) if is_buffer(name) and name not in done]
    done |= set(buffers)
    for importance in importances:
        _check_importance(importance, base, merged, grams)
    if grams:
        held = [set(importance.names) & set(merged) for importance in importances]
        for importance, names in zip(importances, held, strict=True):
            check_same_weighed(names, held[0], f"the importance '{importance.path}'")
    copied = [name for name in base.names if name not in done]
    tied = {name: [twin for twin in twins if twins[twin] == name] for name in twins.values()}
    given = list(importances)
    return Plan(base, tasks, given, merged, buffers, copied, tied, dtype, grams, no_base)


class Chosen:
    """The parameters that a selection chooses in checkpoints that may have other ones.

    Attributes:
        narrows: Whether it leaves anything out.

    Raises:
        InputError: If a pattern fits no tensor of any of them, nothing is left, or a chosen tensor
            is complex.
    """

    def __init__(self, selection: Selection, every: Sequence[Weights]) -> None:
        self._selection = selection
        self.narrows = bool(selection.include or selection.exclude)
        names = selection.names(dict.fromkeys(name for weights in every for name in weights.names))
        for weights in every:
            held = set(weights.names)
            wrong = [n for n in names if n in held and weights.dtype(n).is_complex]
            if wrong:
                raise InputError(
                    f"'{weights.path}' has complex tensors, which cannot be merged: "
                    f"{listing(wrong)}. Take the base's: exclude them"
                )

    def of(self, weights: Weights) -> list[str]:
        """Names of those that a checkpoint has, in its order.

        What is named like a buffer is one, unless it is included by its whole name.
        """
        named = self._selection.include
        names = [name for name in floating(weights) if name in named or not is_buffer(name)]
        return self._selection.chosen(names)

    def of_either(self, task: Weights, base: Weights) -> tuple[list[str], list[str]]:
        """What a task and the base have of all that is chosen in one of the two."""
        wanted = {*self.of(task), *self.of(base)}
        theirs, ours = (
            [name for name in weights.names if name in wanted] for weights in (task, base)
        )
        return theirs, ours


def dtype_name(weights: Weights, name: str) -> str:
    """Name the dtype of a tensor as users know it, as in ``"float32"``."""
    return str(weights.dtype(name)).removeprefix("torch.")


def check_base(base: Weights, expected: str = _BASE) -> None:
    """Refuse a task vector where weights are wanted."""
    if base.is_task_vector:
        raise InputError(f"'{base.path}' is a task vector, but {expected}")


def _check_task(task: Weights, base: Weights, chosen: Chosen, than: str) -> dict[str, str]:
    """Check a task; returns tied tensors of the base that it lacks, with what they are tied to."""
    named = f"'{task.path}'"
    theirs, ours = chosen.of_either(task, base)
    twins: dict[str, str] = {}
    if task.is_task_vector:
        held = set(base.names)
        integers = [n for n in theirs if n in held and not base.dtype(n).is_floating_point]
        if integers:
            raise InputError(
                f"{named} changes tensors that {than} has as integers: {listing(integers)}. It "
                "must be the model that the task vector was made with"
            )
    else:
        twins, ignored = _tied(task, theirs, base, ours)
        ours = [name for name in ours if name not in twins]
        theirs = [name for name in theirs if name not in ignored]
    given, wanted = _layout(task, theirs), _layout(base, ours)
    check_same_layout(given, wanted, named, than, partly=task.is_task_vector, of_files=True)
    if not task.is_task_vector:
        mixed = {n for n, t in given.items() if not _both_floating(t, wanted[n])}
        check_same_dtypes({n: given[n] for n in mixed}, wanted, named, than)
    return twins


def _both_floating(one: Tensor, other: Tensor) -> bool:
    return one.is_floating_point() and other.is_floating_point()


def unmatched(
    task: Weights, theirs: Sequence[str], base: Weights, ours: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Names, of those chosen, that a task lacks, and that it has more; but for tied ones."""
    twins, ignored = _tied(task, theirs, base, ours)
    of_task, of_base = {*theirs, *twins}, {*ours, *ignored}
    missing = [name for name in ours if name not in of_task]
    return missing, [name for name in theirs if name not in of_base]


def _tied(
    task: Weights, theirs: Sequence[str], base: Weights, ours: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What only the base has, or only the task, and which other of its tensors holds the same."""
    of_task, of_base = set(theirs), set(ours)
    both = [name for name in ours if name in of_task]
    return (
        _twins(base, [name for name in ours if name not in of_task], both),
        _twins(task, [name for name in theirs if name not in of_base], both),
    )


def _twins(weights: Weights, names: Iterable[str], among: Sequence[str]) -> dict[str, str]:
    """Find tensors that hold the same as another one of their checkpoint."""
    found = {}
    for name in names:
        twin = next((other for other in among if is_twin(weights, name, other)), None)
        if twin is not None:
            found[name] = twin
    return found


def _stored_twice(every: Sequence[Weights], names: Sequence[str]) -> dict[str, str]:
    """Find what all checkpoints hold twice, as `torch.save` stores tied matrices.

    They are one parameter: it counts once, and what is drawn at random is drawn once.
    """
    base, seen, found = every[0], dict[object, str](), dict[str, str]()
    for name in names:
        start = base.read(name, 0, 64).view(torch.uint8).numpy().tobytes()
        first = seen.setdefault((base.shape(name), start), name)
        if first != name and all(is_twin(weights, name, first) for weights in every):
            found[name] = first
    return found


def _check_tied(task: Weights, twins: Mapping[str, str]) -> None:
    """Refuse a task in which what is tied in the base is not."""
    held = set(task.names)
    for name, twin in twins.items():
        if name in held and not task.is_task_vector and not is_twin(task, name, twin):
            raise InputError(
                f"'{task.path}' has another '{name}' than '{twin}', which the base and another "
                f"task have tied; take the base's: exclude '{name}'"
            )


def _check_factors(weights: Weights, names: Sequence[str]) -> None:
    """Refuse factors of LoRA that have no start in common: what they make is their product."""
    factors = [name for name in names if re.search(r"\.lora_[AB]\.", name)]
    if factors:
        raise InputError(
            f"'{weights.path}' holds factors of LoRA, which mean nothing one by one: "
            f"{listing(factors)}. Give the folders of the adapters, with their base or lora_rank, "
            "or merge each into its base first (peft: model.merge_and_unload())"
        )


def _check_importance(importance: Weights, base: Weights, merged: list[str], grams: bool) -> None:
    what = f"the importance '{importance.path}'"
    held, wanted = set(importance.names), set(merged)
    missing = [name for name in merged if name not in held]
    if missing and not grams:
        raise InputError(f"{what} lacks tensors that are merged: {listing(missing)}")
    given = _layout(importance, [name for name in importance.names if grams or name in wanted])
    than = f"the base '{base.path}'"
    check_importances(given, _layout(base, merged), what, than, grams=grams)


def _layout(weights: Weights, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint's names, shapes and dtypes that hold nothing."""
    return {
        name: torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta")
        for name in names
    }
