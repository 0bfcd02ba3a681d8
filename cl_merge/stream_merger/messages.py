"""What a stream tells its user: what was merged, and what happened that may not be meant."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_merge.errors import listing, task_name
from cl_merge.mergers import Merger
from cl_merge.mergers.stack import StackMerger

log = logging.getLogger("cl_merge.stream_merger")


def tell_merged(
    merger: Merger, task: int, merged: Mapping[str, Tensor], device: torch.device
) -> None:
    """Log a task that was folded, of tensors like these, and once how much memory tasks take."""
    values = sum(tensor.numel() for tensor in merged.values())
    log.info("merged %s: %d values in %d parameters", task_name(task), values, len(merged))
    if isinstance(merger, StackMerger) and task == 0:
        message = "method '%s' keeps every task vector in memory: %.1f MiB per task on %s"
        log.info(message, merger.name, 4 * values / 2**20, device)


def warn_of_buffers(names: Sequence[str]) -> None:
    """Say that buffers moved, where nobody has chosen what the merged model holds."""
    _warn(
        f"{len(names)} floating-point buffers moved during training and are not merged: "
        f"{listing(names)}. Evaluation uses those of the last task; choose with "
        "buffers='trained' | 'base' | 'average', or freeze them"
    )


def warn_of_moved(names: Sequence[str]) -> None:
    """Say that parameters moved which cannot be merged."""
    _warn(
        f"{len(names)} parameters moved without a gradient, or are complex, and are not merged: "
        f"{listing(names)}. The merged model has them as the last task left them"
    )


def warn_of_frozen() -> None:
    """Say that nothing trains as a task begins, though something may from now on."""
    _warn(
        "the module has no floating-point parameter that requires a gradient; what is unfrozen "
        "from now on will be merged"
    )


def warn_of_start(task: int, names: Sequence[str]) -> None:
    """Say that a task starts at weights that the last one did not leave."""
    _warn(
        f"{task_name(task)} starts at other weights than {task_name(task - 1)} left: "
        f"{listing(names)}. It is folded into the same merge; call reset() where a new stream "
        "begins, or choose start='independent' or 'merged'"
    )


def is_first_process() -> bool:
    """Whether this is the process of rank 0, or the only one."""
    distributed = torch.distributed
    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


def _warn(message: str) -> None:
    if is_first_process():
        warnings.warn(message, stacklevel=4)
