"""How long each task trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError


def task_epochs(config: RunConfig, tasks: int) -> list[Any]:
    """Tell how many epochs each task of a stream trains for.

    Args:
        config: Has ``epochs``, a number for each task, or none and ``trainer.max_epochs``.
        tasks: How many tasks the stream has.

    Returns:
        For each task the ``max_epochs`` of its trainer.

    Raises:
        InputError: If there is not one whole number from 1 for each task.

    Example:
        >>> task_epochs(RunConfig(epochs=[3, 1]), 2)
        [3, 1]
    """
    found = config.epochs
    if found is None:
        return [config.trainer.get("max_epochs")] * tasks
    whole = isinstance(found, Sequence) and not isinstance(found, str)
    if not whole or any(type(epochs) is not int or epochs < 1 for epochs in found):
        raise InputError(f"epochs={found}; expected a list of whole numbers from 1, one per task")
    if len(found) != tasks:
        raise InputError(
            f"epochs has {len(found)} numbers, but the stream has {tasks} tasks; expected one for "
            "each task, or epochs=null to train each for trainer.max_epochs"
        )
    return list(found)
