"""Safetensors files, one or many, read through memory maps."""

from __future__ import annotations

import functools
import mmap
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.storage.safetensors_format import read_header
from cl_merge.storage.weights import Weights

# Maps that one checkpoint keeps at a time: each holds a file handle, and a system gives a process
# as few as 256.
_MAPS = 4
# Without it, Linux refuses to map a file larger than the memory, because the pages of a private map
# might all be written to. Python has its number since 3.13; before, only for the usual processors.
_USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _USUAL else 0)


class SafetensorsFile:
    """A safetensors file that was found to be sound.

    Attributes:
        path: As given.
        locations: Where its tensors lie, by name, in the order of the file.
        metadata: Words beside the tensors.

    Raises:
        InputError: If it is damaged or holds types that torch cannot compute with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = _stamp(os.stat(path))
        self.locations, self.metadata = read_header(path)

    def map(self) -> Tensor:
        """Map the file, uint8 [bytes]; the map lives as long as the tensor and its views."""
        try:
            with self.path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self._stamp:
                    raise InputError(f"'{self.path}' changed while it was read; start again")
                return torch.frombuffer(_private_map(file.fileno()), dtype=torch.uint8)
        except OSError as error:
            raise InputError(f"'{self.path}' cannot be read ({error.strerror})") from error


class SafetensorsWeights(Weights):
    """A checkpoint in one or more safetensors files.

    Args:
        path: What was opened.
        files: Its files, in order.
        kind: What `Weights.kind` shall be.
    """

    def __init__(self, path: Path, files: Sequence[SafetensorsFile], kind: str) -> None:
        self.path = path
        self.kind = kind
        self.metadata = dict(files[0].metadata) if files else {}
        self.is_task_vector = kind == "task vector"
        self._files = {name: file for file in files for name in file.locations}
        self.names = list(self._files)
        self._map = functools.lru_cache(maxsize=_MAPS)(SafetensorsFile.map)
        self._closed = False

    @override
    def shape(self, name: str) -> torch.Size:
        return self._files[name].locations[name].shape

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].locations[name].dtype

    @override
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        file = self._files[name]
        dtype, shape, offset, _ = file.locations[name]
        start, stop, _ = slice(start, stop).indices(shape.numel())
        if start >= stop:
            return torch.empty(0, dtype=dtype)
        if self._closed:
            raise RuntimeError(f"'{self.path}' was closed")
        begin, end = offset + start * dtype.itemsize, offset + stop * dtype.itemsize
        raw = self._map(file)[begin:end]
        # The format does not ask for aligned tensors, but compiled code takes them for granted.
        return (raw.clone() if begin % dtype.itemsize else raw).view(dtype)

    @override
    def close(self) -> None:
        self._closed = True
        self._map.cache_clear()


def _private_map(handle: int) -> mmap.mmap:
    """Map a file so that pages may be written to, though no one does and it would not reach it.

    Torch warns of memory that cannot be written to.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # on Windows
        return mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(
        handle, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """Tell one file, and one state of it, from another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
