"""What every opened checkpoint offers, whatever kind of file it lies in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cl_merge.errors import InputError

TASK_VECTOR = "cl_merge.task_vector"
"""Metadata key that marks a file as a task vector; its value is the version of the format."""

PLAIN_VERSION, QUANTIZED_VERSION = "1", "2"


class Weights(ABC):
    """One opened checkpoint: named tensors that stay on the disk until they are used.

    A context manager that closes itself. `read` may be called from several threads.

    Attributes:
        path: What was opened, a file or a folder.
        kind: ``"safetensors"``, ``"sharded safetensors"``, ``"task vector"``,
            ``"torch checkpoint"`` or ``"Lightning checkpoint"``.
        metadata: Of the first safetensors file; empty for other kinds.
        is_task_vector: Whether `TaskVector.save` wrote it.
        names: Names of the tensors, in the order in which they lie on the disk.
        folder: The folder that was opened, with the files beside the weights; None for a file.
        file_name: Name of the file with the weights, or of the index of its shards.
    """

    path: Path
    kind: str
    metadata: dict[str, str]
    is_task_vector: bool
    names: list[str]
    folder: Path | None = None
    file_name: str = ""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Map a stretch of a tensor.

        Args:
            name: Name of the tensor.
            start: Index of the first element, as if the tensor were flat.
            stop: Index after the last element; None for all that follow.

        Returns:
            The elements, flat, for reading only: mostly a view of the file, whose values are read
            when they are used and whose memory belongs to the system's cache.

        Raises:
            InputError: If the file changed since it was opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; what `read` returned stays valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def newer_version(path: str | Path, version: str) -> InputError:
    """Make the error for a task vector of a version that this cl_merge cannot read."""
    return InputError(
        f"'{path}' is a task vector of version {version}, but this cl_merge reads versions "
        f"{PLAIN_VERSION} and {QUANTIZED_VERSION}; update cl_merge"
    )
