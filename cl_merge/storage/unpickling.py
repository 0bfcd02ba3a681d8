"""Read archives of `torch.save` whose pickle holds any objects: nothing but tensors is made."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

# How `torch.save` calls the storage of each dtype; newer ones are stored as bytes.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


def read_without_code(path: Path) -> Any:
    """Read what an archive of `torch.save` holds: tensors, mapped, and plain values.

    No class and no function that the pickle names is imported or called. Where an object of one
    would be, there is a `Placeholder`, which keeps nothing of what the object held.

    Raises:
        Exception: Of any kind, if the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        reader = _Archive(path, archive)
        data = reader.bytes_of(file, "data.pkl")
        if reader.holds("byteorder"):
            reader.swapped = reader.bytes_of(file, "byteorder").decode() != sys.byteorder
        _check_operations(data)
        return _Unpickler(data, reader, file).load()


class _Inert(type):
    """What a placeholder can be asked to do as a type: setting an item does nothing."""

    def __setitem__(cls, key: object, value: object) -> None:
        pass


class Placeholder(metaclass=_Inert):
    """Stands for a class or function that a pickle names, and for all that it would have made.

    It is a type and never an instance, because a pickle may ask for an instance of what another
    call has made. Calling it gives itself, and giving it a state, items or elements does nothing.

    Attributes:
        origin: The name of the class or function, as in ``"argparse.Namespace"``.
        is_tensor: Whether it stands for a tensor of a kind that is not read.
    """

    origin = ""
    is_tensor = False

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """Make nothing: what is called gives itself."""
        return cls

    @staticmethod
    def __setstate__(*state: object) -> None:
        pass

    append = extend = add = __setstate__


def is_placeholder(value: object) -> TypeGuard[type[Placeholder]]:
    """Whether a value of `read_without_code` stands for an object that was not read."""
    return isinstance(value, _Inert)


class _Dict(dict[Any, Any]):
    """An ``OrderedDict`` without the attributes that a pickle may give it."""

    __slots__ = ()

    @staticmethod
    def __setstate__(*state: object) -> None:
        pass


class _Storage(NamedTuple):
    data: torch.UntypedStorage
    dtype: torch.dtype


class _StorageType(Placeholder):
    dtype = torch.uint8


class _UnreadTensor(Placeholder):
    is_tensor = True


class _Tensor(Placeholder):
    """Stands for ``torch._utils._rebuild_tensor``, with ``_v2`` and ``_v3``."""

    def __new__(
        cls,
        storage: object,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *rest: object,  # requires_grad, hooks, for some the dtype, for some more
    ) -> Any:
        if is_placeholder(storage):
            return _UnreadTensor
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor has no storage")
        dtypes = [each for each in rest if isinstance(each, torch.dtype)]
        if rest[2 + len(dtypes) :] and rest[-1]:  # a lazy conjugate, say
            return _UnreadTensor
        tensor = torch.empty(0, dtype=dtypes[0] if dtypes else storage.dtype)
        return tensor.set_(storage.data, offset, size, stride)


class _Parameter(Placeholder):
    """Stands for ``torch._utils._rebuild_parameter``, also with a state."""

    def __new__(cls, data: object, *rest: object) -> Any:
        return data if isinstance(data, Tensor) else _UnreadTensor


class _Subclass(Placeholder):
    """Stands for ``torch._tensor._rebuild_from_type_v2``: a tensor of a class, with attributes."""

    def __new__(cls, function: object, kind: object, args: tuple[Any, ...], *rest: object) -> Any:
        made = function(*args) if is_placeholder(function) else None
        return made if isinstance(made, Tensor) else _UnreadTensor


_KNOWN: Mapping[tuple[str, str], type] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _Subclass,
}


class _Archive:
    """The records of an archive of `torch.save`, which holds them as they are."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        (pickled,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
        self._archive = archive
        self._root = pickled.partition("/")[0]
        self._size = os.path.getsize(path)
        self.map = torch.UntypedStorage.from_file(os.fspath(path), False, self._size)
        self.swapped = False  # whether it was written with the other order of bytes

    def holds(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._archive.namelist()

    def bytes_of(self, file: io.BufferedReader, name: str) -> bytes:
        start, size = self.find(file, name)
        file.seek(start)
        return file.read(size)

    def find(self, file: io.BufferedReader, name: str) -> tuple[int, int]:
        """Find where a record begins in the file, and its bytes."""
        info = self._archive.getinfo(f"{self._root}/{name}")
        file.seek(info.header_offset)
        lengths = struct.unpack("<26x2H", file.read(30))
        start = info.header_offset + 30 + sum(lengths)
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > self._size:
            raise zipfile.BadZipFile(f"its record {name!r} is compressed or cut short")
        return start, info.file_size


class _Unpickler(pickle.Unpickler):
    """Finds the functions of `_KNOWN`, storages and dtypes; for all else, placeholders.

    Each is a `Placeholder` or a dtype, so that no instruction can call or change anything else.
    """

    def __init__(self, data: bytes, archive: _Archive, file: io.BufferedReader) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._file = file
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if known := _KNOWN.get((module, name)):
            return known
        package = module.partition(".")[0]
        if package == "torch" and name in _STORAGES:
            return type("_StorageType", (_StorageType,), {"dtype": _STORAGES[name]})
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        unread = package == "torch" and re.search("Tensor|Parameter|_rebuild", name)
        base = _UnreadTensor if unread else Placeholder
        return type("_Unknown", (base,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage | type[Placeholder]:
        word, kind, key, _, numel = pid
        if word != "storage" or not is_placeholder(kind):
            raise pickle.UnpicklingError("what a tensor refers to is no storage")
        if not issubclass(kind, _StorageType):  # of quantised tensors, say
            return kind
        if key not in self._storages:
            start, size = self._archive.find(self._file, f"data/{key}")
            wanted = numel * kind.dtype.itemsize
            if not 0 <= wanted <= size:
                raise zipfile.BadZipFile(f"its record data/{key} is cut short")
            data = self._archive.map[start : start + wanted]
            if self._archive.swapped:
                data.byteswap(kind.dtype)
            self._storages[key] = _Storage(data, kind.dtype)
        return self._storages[key]


def _check_operations(data: bytes) -> None:
    """Refuse instructions that would go round `find_class`, or take memory without end."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name.startswith("EXT"):  # objects that this process has registered
            raise pickle.UnpicklingError("its pickle takes objects from the process")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise pickle.UnpicklingError("its pickle numbers more objects than it holds")
