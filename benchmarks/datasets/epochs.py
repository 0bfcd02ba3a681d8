"""How long each task trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError


def task_epochs(config: RunConfig, tasks: int) -> list[Any]:
    """How many epochs each task of a stream trains for: ``max_epochs`` of its trainer.

    Example:
        >>> task_epochs(RunConfig(epochs=[3, 1]), 2)
        [3, 1]
    """
    found = config.epochs
    if found is None:
        return [config.trainer.get("max_epochs")] * tasks
    listed = isinstance(found, Sequence) and not isinstance(found, str)
    if not listed or any(type(epochs) is not int or epochs < 1 for epochs in found):
        raise InputError(f"epochs={found}; expected a list of whole numbers from 1, one per task")
    if len(found) != tasks:
        raise InputError(
            f"epochs has {len(found)} numbers, but the stream has {tasks} tasks; expected one for "
            "each task, or epochs=null to train each for trainer.max_epochs"
        )
    return list(found)
