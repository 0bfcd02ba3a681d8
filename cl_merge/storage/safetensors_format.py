"""The safetensors format: its header, read and written, and its data, read through memory maps."""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import platform
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_merge.errors import InputError
from cl_merge.storage.weights import StoredTensor, Weights

Entry = tuple[torch.dtype, Sequence[int]]
"""Dtype and shape of a tensor."""

# The library has the same table, but keeps it to itself. Types of less than a byte are left out:
# torch has no tensors of them whose elements can be counted.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
CODES = {dtype: code for code, dtype in DTYPES.items()}

_POINTER = b"version https://git-lfs.github.com/"  # how the files begin that Git has of large ones
_LONGEST_HEADER = 100_000_000  # what readers of safetensors accept
# Maps that one checkpoint keeps at a time: each holds a file handle, and a system gives a process
# as few as 256.
_MAPS = 4
# Without it, Linux refuses to map a file larger than the memory, because the pages of a private map
# might all be written to. Python has its number since 3.13; before, only for the usual processors.
_USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _USUAL else 0)


class Header:
    """The header of a file that is written piece by piece, with room for as long metadata."""

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        _check_entries(entries, metadata)
        # The widest dtypes first, so that all data is aligned.
        names = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
        self.entries = {name: entries[name] for name in names}
        self._table: dict[str, dict[str, Any]] = {}
        end = 0
        for name, (dtype, shape) in self.entries.items():
            begin, end = end, end + size_of((dtype, shape))
            entry = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._table[name] = entry
        length = len(self._text(metadata))
        self._data = 8 + length + -length % 8
        if self._data > _LONGEST_HEADER:
            raise InputError(
                f"the names of {len(entries)} tensors are too long for a safetensors file; write "
                "to a folder, with a smaller shard_bytes"
            )
        self.offsets = {n: self._data + row["data_offsets"][0] for n, row in self._table.items()}
        self.size = self._data + end  # bytes of the file

    def encode(self, metadata: Mapping[str, str]) -> bytes:
        """Make all that precedes the data; the metadata may be no longer than the first ones."""
        text = self._text(metadata)
        if len(text) > self._data - 8:
            raise RuntimeError("the new metadata is longer than what was there")
        return struct.pack("<Q", self._data - 8) + text.ljust(self._data - 8)

    def _text(self, metadata: Mapping[str, str]) -> bytes:
        # Without tensors, an empty table of metadata would make a header that nothing can read.
        words = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        try:
            text = json.dumps({**words, **self._table}, separators=(",", ":"), ensure_ascii=False)
            return text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a name of a tensor is no text ({error.object[:80]!r})") from error


class TensorLocation(NamedTuple):
    """Where a tensor lies in its file: its bytes are those from `start` to `stop`."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """Read where the tensors of a sound file lie, in the order of the file, and its metadata."""
    try:
        # The library checks lengths, offsets, overlaps, holes and shapes. Not for "pt": that would
        # map the file for torch too, and only if it fits into memory.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=once_each)
    except (SafetensorError, ValueError, struct.error) as error:
        raise not_whole(path, error) from error
    metadata = header.pop("__metadata__", None) or {}
    found = {name: _location(path, name, entry, 8 + length) for name, entry in header.items()}
    return dict(sorted(found.items(), key=lambda item: item[1][2:])), metadata


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
        name: StoredTensor(found.dtype, found.shape, functools.partial(_read, mapped, file, found))
        for file in files
        for name, found in file.locations.items()
    }
    return Weights(path, kind, tensors, files[0].metadata if files else {})


def raw_bytes(tensor: Tensor) -> memoryview:
    """View the values of a tensor of any dtype, shape, strides and device as bytes, row by row."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    # One element counts as contiguous whatever its stride, which a view as bytes minds.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def size_of(entry: Entry) -> int:
    """Bytes that a tensor takes."""
    dtype, shape = entry
    return math.prod(shape) * dtype.itemsize


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, in which readers would silently drop all but one of equal names."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"'{name}' is there twice")
        table[name] = value
    return table


def not_whole(path: str | Path, reason: object, kind: str = "safetensors file") -> InputError:
    """Make the error for a file that is not of the kind that its name says, or damaged."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return InputError(
                f"'{path}' is a pointer of Git LFS in place of the file itself; fetch that with "
                "git lfs pull"
            )
    return InputError(
        f"'{path}' is not a whole {kind} ({reason}); it is corrupt, cut short or of another "
        "format: write or download it again"
    )


def _check_entries(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    for name, (dtype, _) in entries.items():
        if dtype not in CODES or name == "__metadata__":
            raise InputError(
                f"'{name}' of {dtype} cannot be written to a safetensors file; leave it out, or "
                "convert it to another dtype or name"
            )
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise InputError(f"metadata are text by name, but {key!r} is {text!r}; convert it")


def _location(path: Path, name: str, entry: dict[str, Any], data: int) -> TensorLocation:
    code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in DTYPES:
        raise InputError(
            f"'{path}': '{name}' is of type {code}, which cannot be computed with; convert it to "
            f"one of {', '.join(DTYPES)}"
        )
    if any(size >= 1 << 63 for size in shape):
        raise not_whole(path, f"'{name}' has the shape {shape}")
    return TensorLocation(DTYPES[code], torch.Size(shape), data + start, data + stop)


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
    """Map a file; writable, as torch warns of memory that is not, but nothing reaches the file."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # on Windows
        return mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
    flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(handle, 0, flags=flags, prot=protection)


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
