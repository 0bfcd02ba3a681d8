"""Task vectors of a stream in which parameters joined and grew, beside the base of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.storage import Weights
from cl_merge.storage.weights import GROWN_BASE, StoredTensor


def grown_vectors(tasks: Sequence[Weights], base: Weights) -> list[Weights]:
    """Extend task vectors to all that the base has, if it is of a stream that grew.

    Raises:
        InputError: If a parameter has no place in the base.
    """
    if GROWN_BASE not in base.metadata:
        return list(tasks)
    return [GrownVector(task, base) if task.is_task_vector else task for task in tasks]


class GrownVector(Weights):
    """A task vector that is 0 in the parameters and rows that came after its task.

    Args:
        vector: The task vector as it was written.
        base: The base of all tasks, which says what there is.

    Attributes:
        vector: As given.

    Raises:
        InputError: If a parameter has no place in the base.
    """

    def __init__(self, vector: Weights, base: Weights) -> None:
        self.vector = vector
        wrong = [
            f"{name} {tuple(vector.shape(name))}"
            for name in vector.names
            if name not in base.names or not _is_part(vector.shape(name), base.shape(name))
        ]
        if wrong:
            raise InputError(
                f"'{vector.path}' has {listing(wrong)}, which are no rows of the base "
                f"'{base.path}'; give the base of the last task"
            )
        dtype = next((vector.dtype(name) for name in vector.names), torch.float32)
        tensors = {
            name: StoredTensor(dtype, base.shape(name), self._reads(name)) for name in base.names
        }
        super().__init__(vector.path, vector.kind, tensors, vector.metadata)

    def _reads(self, name: str) -> Callable[[int, int], Tensor]:
        size = self.vector.shape(name).numel() if name in self.vector.names else 0

        def read(start: int, stop: int) -> Tensor:
            there = self.vector.read(name, start, min(stop, size)) if start < size else None
            if there is not None and stop <= size:
                return there
            result = torch.zeros(stop - start, dtype=self.dtype(name))
            if there is not None:
                result[: len(there)] = there
            return result

        return read


def _is_part(shape: torch.Size, of: torch.Size) -> bool:
    """Whether a tensor is the first rows of another, so that flat indices agree."""
    return shape == of or (len(shape) == len(of) > 0 and shape[1:] == of[1:] and shape[0] <= of[0])
