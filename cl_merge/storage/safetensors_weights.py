"""Safetensors files, one or many, read through memory maps."""

from __future__ import annotations

import functools
import mmap
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cl_merge.errors import InputError
from cl_merge.storage.safetensors_format import TensorLocation, read_header
from cl_merge.storage.weights import StoredTensor, Weights

# Maps that one checkpoint keeps at a time: each holds a file handle, and a system gives a process
# as few as 256.
_MAPS = 4
# Without it, Linux refuses to map a file larger than the memory, because the pages of a private map
# might all be written to. Python has its number since 3.13; before, only for the usual processors.
_USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _USUAL else 0)


class SafetensorsFile:
    """A sound safetensors file: where its tensors lie, in its order, and the words beside them."""

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


def safetensors_weights(path: Path, files: Sequence[SafetensorsFile], kind: str) -> Weights:
    """Join the tensors of files to one checkpoint, with the metadata of the first file."""
    mapped = functools.lru_cache(maxsize=_MAPS)(SafetensorsFile.map)
    tensors = {
        name: StoredTensor(
            location.dtype, location.shape, functools.partial(_read, mapped, file, location)
        )
        for file in files
        for name, location in file.locations.items()
    }
    return Weights(path, kind, tensors, files[0].metadata if files else {})


def _read(
    mapped: Callable[[SafetensorsFile], Tensor],
    file: SafetensorsFile,
    location: TensorLocation,
    start: int,
    stop: int,
) -> Tensor:
    size = location.dtype.itemsize
    begin, end = location.start + start * size, location.start + stop * size
    raw = mapped(file)[begin:end]
    # The format does not ask for aligned tensors, but compiled code takes them for granted.
    return (raw.clone() if begin % size else raw).view(location.dtype)


def _private_map(handle: int) -> mmap.mmap:
    """Map a file so that pages may be written to, as torch warns of memory that may not.

    No one writes to them, and it would not reach the file.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # on Windows
        return mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(
        handle, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """Tell one file, and one state of it, from another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
