"""Tensors on disk: written whole or not at all, and read with an error that says what is wrong."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_merge.errors import InputError, StorageError
from cl_merge.storage.safetensors_format import Header, not_whole, raw_bytes

# How `_hidden` ends, and what safetensors calls a file that is not whole yet.
_ENDING = r"\.[0-9a-f]{8}\.tmp"
_TEMPORARY = re.compile(rf"\..+{_ENDING}|\.tmp[0-9A-Za-z]{{6}}")
# On Windows, a file that is mapped into memory cannot be replaced.
_MAP = sys.platform != "win32"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all.

    The block writes to a temporary neighbour, an empty file, which replaces `path` in one step: a
    crash or a power cut leaves either the former file or the new one. Missing parent folders are
    made.

    Example::

        with atomic_write("results.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    with storage_errors(path), appearing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder as `atomic_write` makes a file, where at most an empty folder may be."""
    with storage_errors(path), appearing(Path(os.path.realpath(path))) as hidden:
        hidden.mkdir(parents=True)
        yield hidden


@contextmanager
def appearing(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Name a hidden neighbour, of which the block makes the file or the folder at `path`.

    It must not be open when the block ends: it gets its name when everything in it has reached the
    disk. It is removed if the block raises.
    """
    hidden = _hidden(path)
    try:
        yield hidden
        with storage_errors(path):
            _publish(hidden, path, overwrite)
    except BaseException:
        with suppress(OSError):  # what the block raised says more
            _remove(hidden)
        raise


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of the system, and of the writers of torch and safetensors, to `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason: object = error
        if isinstance(error, OSError):
            reason = error.strerror or error
        elif re.search("PytorchStreamWriter|inline_container", str(error)):
            reason = "the disk took no more"  # which `torch.save` tells by such text only
        elif not (isinstance(error, SafetensorError) and "I/O error" in str(error)):
            raise
        raise StorageError(
            f"'{path}' cannot be written ({reason}); nothing that was there before is lost"
        ) from error


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders of writers that were killed, at all depths."""
    for path in list(Path(folder).rglob(".*tmp*")):
        if _TEMPORARY.fullmatch(path.name):
            with storage_errors(path):
                _remove(path)


def remove_leftovers_of(path: Path) -> None:
    """Remove what writers of one file or folder left when they were killed."""
    leftover = re.compile(re.escape(f".{path.name}") + _ENDING)
    for other in list(path.parent.iterdir()):
        if leftover.fullmatch(other.name):
            _remove(other)


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state of nested dictionaries, lists, tensors and plain values, atomically."""
    with atomic_write(path) as temporary:
        torch.save(dict(state), temporary)
        try:
            # The tensors stay on the disk: this reads the names and plain values only. It is now
            # that a bad one must show, not when the state is needed.
            load_state(temporary)
        except InputError as error:
            raise InputError(
                f"'{path}' could not be read again ({_reason(error.__cause__)}); keep only tensors "
                "and plain values in hyper-parameters and in the states of callbacks"
            ) from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` or Lightning wrote: tensors and plain values, never code.

    The tensors are on the CPU, mapped from the file and read when they are used.
    """
    _require_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_MAP)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    # The reader of torch raises whatever damaged bytes lead it to.
    except Exception as error:
        raise _no_checkpoint(path, error) from error


def check_state(path: str | Path) -> None:
    """Make sure, by the checksums in it, that no byte of a file of `save_state` has changed."""
    _require_file(path)
    try:
        with ZipFile(path) as file:
            broken = file.testzip()
    # The reader of archives, too, raises errors of many kinds.
    except Exception as error:
        raise _no_checkpoint(path, error) from error
    if broken is not None:
        raise _no_checkpoint(path, ValueError(f"'{broken}' in it has changed"))


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a safetensors file, atomically; the same content gives the same bytes."""
    header = Header({name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(header.encode(metadata))
        for name in header.entries:
            file.write(raw_bytes(tensors[name]))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the metadata of a safetensors file."""
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise not_whole(path, error) from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error})") from error
    return tensors if _MAP else {n: tensor.clone() for n, tensor in tensors.items()}, metadata


def is_no_file(path: str | Path) -> bool:
    """Tell whether something other than a file is there: to read a pipe may never end."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # reading it says why
        return False


def _publish(hidden: Path, path: Path, overwrite: bool) -> None:
    """Replace a file, where that is allowed, or an empty folder; anything else is an `OSError`."""
    if not hidden.exists():  # `remove_leftovers_of` takes it for that of a killed process
        raise FileNotFoundError(errno.ENOENT, "another process writes to the same name")
    for each in [*hidden.rglob("*"), hidden]:
        _flush_to_disk(each)
    if hidden.is_dir():
        with suppress(FileNotFoundError):
            path.rmdir()
    elif not overwrite and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    os.replace(hidden, path)
    _flush_to_disk(path.parent)


def _flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        return
    with suppress(OSError):  # Windows cannot open a folder, and some systems cannot flush one
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder, if it is there."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Renamed first: what still writes to it must not publish the rest of it.
    with suppress(OSError):
        path = path.rename(_hidden(path))
    shutil.rmtree(path, ignore_errors=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise InputError(f"there is no file '{path}'; check the path")


def _no_checkpoint(path: str | Path, error: Exception) -> InputError:
    return InputError(
        f"'{path}' is not a whole checkpoint ({_reason(error)}); restore it, or start again in a "
        "new folder"
    )


def _reason(error: BaseException | None) -> str:
    """The line that tells what is wrong, of the many that torch writes."""
    lines = str(error).splitlines() or [type(error).__name__]
    # "GLOBAL" is what pickle calls a class or a function.
    line = next((line for line in lines if "GLOBAL" in line), lines[0])
    return line.partition(" Please use ")[0].strip(" .")
