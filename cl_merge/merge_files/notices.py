"""What to tell after a merge: what no one would do on purpose."""

from __future__ import annotations

import logging

import torch

from cl_merge.errors import listing
from cl_merge.merge_files.inputs import Inputs
from cl_merge.merge_files.plan import Plan
from cl_merge.storage import Weights

log = logging.getLogger(__name__)


def warn(plan: Plan, inputs: Inputs, hashes: list[str], buffers: str | None) -> None:
    """Log what should be known of a merge that went well.

    Args:
        plan: What was merged.
        inputs: What was read, and what was found on the way.
        hashes: Of what each of the inputs holds.
        buffers: What was chosen for buffers; None if nobody chose.
    """
    for task in plan.tasks:
        if not plan.is_added(task) and (names := _coarser(task, plan)):
            log.warning(
                "'%s' is stored in a shorter dtype than the base: what rounding took from its "
                "weights counts as its change, in %s. If it was trained in that dtype, give the "
                "base in it, too; dtype says what is written",
                task.path,
                listing(names),
            )
    seen: dict[str, Weights] = {}
    given = list(zip(inputs.all, hashes, strict=True))[plan.no_base :]
    for weights, of_content in given:
        first = seen.setdefault(of_content, weights)
        if first.path != weights.path:
            log.warning("'%s' holds the same as '%s'", weights.path, first.path)
        elif first is not weights:
            log.warning("'%s' is given more than once", weights.path)
    if inputs.differing:
        log.warning(
            "tensors that are not merged differ between the inputs; %s were taken: %s",
            "the first file's" if plan.no_base else "the base's",
            listing(sorted(inputs.differing)),
        )
    if inputs.left_out:
        log.warning(
            "tensors that the base lacks, or has in another shape, were left out: %s",
            listing(sorted(inputs.left_out)),
        )
    if inputs.moved_buffers and buffers is None:
        log.warning(
            "floating-point buffers differ and are not merged: %s. The %s were taken; choose with "
            "buffers: trained, base or average. A parameter that is only named like one is merged "
            "if include gives its whole name",
            listing(sorted(inputs.moved_buffers)),
            "first file's" if plan.no_base else "last task's",
        )


def _coarser(task: Weights, plan: Plan) -> list[str]:
    """Merged tensors that a task has with less precision than the base."""

    def step(weights: Weights, name: str) -> float:
        return torch.finfo(weights.dtype(name)).eps

    held = set(task.names)
    return [n for n in plan.merged if n in held and step(task, n) > step(plan.base, n)]
