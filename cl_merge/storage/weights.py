"""What every opened checkpoint offers, whatever kind of file it lies in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing

TASK_VECTOR = "cl_merge.task_vector"
"""Metadata key that marks a file as a task vector; its value is the version of the format."""

GROWN_BASE = "cl_merge.grown_base"
"""Metadata key of a base to which parameters or rows were added between tasks."""

PLAIN_VERSION, QUANTIZED_VERSION = "1", "2"


class StoredTensor(NamedTuple):
    """A tensor on the disk, and how to read a stretch of it, from an element to before another."""

    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[int, int], Tensor]  # called from several threads, for at least one element


class Weights:
    """One opened checkpoint: named tensors that stay on the disk until they are used.

    A context manager that closes itself. `read` may be called from several threads.

    Attributes:
        path: What was opened, a file or a folder, with the key in the file if one was given.
        kind: ``"safetensors"``, ``"sharded safetensors"``, ``"task vector"``,
            ``"LoRA adapter"``, ``"torch checkpoint"``, ``"sharded torch checkpoint"`` or
            ``"Lightning checkpoint"``.
        metadata: Of the first safetensors file; empty for other kinds.
        is_task_vector: Whether it holds changes: `TaskVector.save` wrote it, or it is an adapter.
        names: Names of the tensors, in the order in which they lie on the disk.
        folder: The folder that was opened, with the files beside the weights; None for a file.
        file_name: Name of the file with the weights, or of the index of its shards.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.metadata = dict(metadata or {})
        self.is_task_vector = kind == "task vector"
        self.names = list(tensors)
        self.folder: Path | None = None
        self.file_name = ""
        self._entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        self._readers = {name: tensor.read for name, tensor in tensors.items()}

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._entries[name][0]

    def strip(self, prefix: str, but: Collection[str] = ()) -> bool:
        """Take a prefix off the names that begin with it, but for some; tells whether any did.

        The dot that ends a prefix may be left out.

        Raises:
            InputError: If two tensors would have one name.
        """
        if any(name.startswith(f"{prefix}.") for name in self.names):
            prefix += "."
        new = {name: name if name in but else name.removeprefix(prefix) for name in self.names}
        if len(set(new.values())) < len(new):
            twice = [n for n, short in new.items() if n != short and short in new]
            raise InputError(
                f"'{self.path}' has two tensors of one name without '{prefix}': {listing(twice)}"
            )
        self.rename(new)
        return any(name != short for name, short in new.items())

    def rename(self, new: Mapping[str, str]) -> None:
        """Call all tensors by new names, no two of which are the same."""
        self.names = [new[name] for name in self.names]
        self._entries = {new[name]: entry for name, entry in self._entries.items()}
        self._readers = {new[name]: reader for name, reader in self._readers.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Map a stretch of a tensor.

        Args:
            name: Name of the tensor.
            start: Index of the first element, as if the tensor were flat.
            stop: Index after the last element; None for all that follow.

        Returns:
            The elements, flat, for reading only: mostly a view of the file, in the system's cache.

        Raises:
            InputError: If the file changed since it was opened.
        """
        dtype, shape = self._entries[name]
        start, stop, _ = slice(start, stop).indices(shape.numel())
        if start >= stop:
            return torch.empty(0, dtype=dtype)
        if not self._readers:
            raise RuntimeError(f"'{self.path}' was closed")
        return self._readers[name](start, stop)

    def close(self) -> None:
        """Let go of the files; what `read` returned stays valid."""
        self._readers = {}  # they alone hold the files' maps

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
