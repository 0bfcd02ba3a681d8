"""Safetensors files, one or many, read through memory maps."""

from __future__ import annotations

import json
import mmap
import os
import platform
import struct
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.storage.dtypes import DTYPES
from cl_merge.storage.weights import Weights

# Maps that one checkpoint keeps at a time: each holds a file handle, and a system gives a process
# as few as 1024.
_MAPS = 4
# Bytes that are handed out before the process lets go of the pages that it touched. They stay in
# the system's cache, but no longer count as this process's memory.
_TOUCHED = 1 << 26
# Without it, Linux refuses to map a file larger than the memory, because the pages of a private map
# might all be written to. Python has its number since 3.13; before, only for the usual processors.
_USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _USUAL else 0)


class Place(NamedTuple):
    """Where a tensor lies in its file.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file that was found to be sound.

    Args:
        path: The file.

    Attributes:
        path: As given.
        places: Where its tensors lie, by name, in the order of the file.
        metadata: Words beside the tensors.

    Raises:
        InputError: If it is damaged or holds types that torch cannot compute with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = _stamp(os.stat(path))
        _check_sound(path)
        self.places, self.metadata = _read_header(path)
        self._touched = 0
        # Both are only let go, never closed: a view would then point into nothing.
        self._map: mmap.mmap | None = None
        self._bytes: Tensor | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether a map is held."""
        return self._bytes is not None

    def map(self) -> None:
        """Map the whole file, for reading; reads nothing yet.

        Raises:
            InputError: If it is another file than before.
        """
        handle = os.open(self.path, os.O_RDONLY)
        try:
            if _stamp(os.fstat(handle)) != self._stamp:
                raise InputError(f"'{self.path}' changed while it was read; start again")
            # Private and writable, as torch warns of memory that it cannot write to. No one does,
            # and it would never reach the file.
            self._map = mmap.mmap(
                handle,
                0,
                flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(handle)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def unmap(self) -> None:
        """Let go of the map; views keep it for as long as they live."""
        self._bytes = self._map = None

    def bytes(self, start: int, stop: int) -> Tensor | None:
        """View a stretch of the file, uint8 [stop - start]; None if it is not mapped."""
        whole, pages = self._bytes, self._map
        if whole is None:
            return None
        self._touched += stop - start
        if self._touched > _TOUCHED and pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._touched = 0
            with suppress(OSError):  # where all memory is locked, it stays
                pages.madvise(mmap.MADV_DONTNEED)  # what is still in use comes back from the cache
        return whole[start:stop]


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
        self._homes = {name: file for file in files for name in file.places}
        self.names = list(self._homes)
        self._lock = threading.Lock()
        self._mapped: deque[SafetensorsFile] = deque()
        self._closed = False

    @override
    def shape(self, name: str) -> torch.Size:
        return self._homes[name].places[name].shape

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._homes[name].places[name].dtype

    @override
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        file = self._homes[name]
        place = file.places[name]
        size = place.dtype.itemsize
        start, stop, _ = slice(start, stop).indices((place.stop - place.start) // size)
        if start >= stop:
            return torch.empty(0, dtype=place.dtype)
        begin, end = place.start + start * size, place.start + stop * size
        raw = file.bytes(begin, end)
        while raw is None:
            self._map(file)
            raw = file.bytes(begin, end)
        # The format does not ask for aligned tensors, but compiled code takes them for granted.
        return (raw.clone() if begin % size else raw).view(place.dtype)

    @override
    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._mapped:
                self._mapped.popleft().unmap()

    def _map(self, file: SafetensorsFile) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"'{self.path}' was closed")
            if file.is_mapped:  # by another thread
                return
            while len(self._mapped) >= _MAPS:
                self._mapped.popleft().unmap()
            try:
                file.map()
            except OSError as error:
                raise InputError(f"'{file.path}' cannot be read ({error.strerror})") from error
            self._mapped.append(file)


def _check_sound(path: Path) -> None:
    """Let the library check lengths, offsets, overlaps, holes and shapes."""
    try:
        # Not "pt": that would map the file for torch too, and only if it fits into memory.
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=once_each)
    except (ValueError, struct.error) as error:
        raise _damaged(path, error) from error
    metadata = header.pop("__metadata__", None) or {}
    places = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    order = sorted(places, key=lambda name: (places[name].start, places[name].stop))
    return {name: places[name] for name in order}, metadata


def _place(path: Path, name: str, entry: dict[str, Any], data: int) -> Place:
    code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in DTYPES:
        raise InputError(
            f"'{path}': '{name}' is of type {code}, which cannot be computed with; convert it to "
            f"one of {', '.join(DTYPES)}"
        )
    if any(size >= 1 << 63 for size in shape):
        raise _damaged(path, f"'{name}' has the shape {shape}")
    return Place(DTYPES[code], torch.Size(shape), data + start, data + stop)


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, in which readers would silently drop all but one of equal names."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' is there twice")
    return table


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(
        f"'{path}' is not a whole safetensors file ({reason}); it is corrupt, cut short or of "
        "another format: write or download it again"
    )
