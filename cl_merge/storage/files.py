"""Tensors on disk: written whole or not at all, and read with an error that says what is wrong."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cl_merge.errors import InputError, StorageError

# What `atomic_write` calls a file that is not whole yet, and what safetensors does.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.tmp[0-9A-Za-z]{6}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all.

    The block writes to a temporary file in the same folder. When the block ends, that file reaches
    the disk and then takes the place of `path` in one step, so that a crash or a power cut at any
    moment leaves either the former file or the new one. Missing parent folders are made.

    Args:
        path: Where the file shall be.

    Yields:
        The temporary path, an empty file for the block to write. It is removed if the block raises.

    Raises:
        StorageError: If the file cannot be written.

    Example::

        with atomic_write("results.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    temporary = hidden_name(path)
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # some writers put a file there that only its owner may read
            flush_to_disk(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # elsewhere folders cannot be opened, and need not be
            flush_to_disk(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a folder whose name appears in one step, when everything is in it.

    What the block writes must have reached the disk when it ends; the folder around `path` is the
    caller's to flush.

    Args:
        path: Where the folder shall be; an empty one may be there.

    Yields:
        The folder meanwhile, beside it; removed if the block raises.
    """
    hidden = hidden_name(path)
    hidden.mkdir()
    try:
        yield hidden
        flush_to_disk(hidden)
        os.rename(hidden, path)  # also onto an empty folder
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn what writers raise for a full disk or a read-only folder into one error.

    Args:
        path: What is being written.

    Yields:
        Nothing.

    Raises:
        StorageError: In the place of any error of the system, and of the writers of torch and of
            safetensors, which have their own.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(_cannot_write(path, error.strerror or error)) from error
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise StorageError(_cannot_write(path, error)) from error
    except RuntimeError as error:
        # The writer behind `torch.save` tells a full disk by text only.
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise StorageError(_cannot_write(path, "the disk took no more")) from error


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed.

    Args:
        folder: Where to look, at all depths.

    Raises:
        StorageError: If one cannot be removed.
    """
    for file in Path(folder).rglob(".*tmp*"):
        if _TEMPORARY.fullmatch(file.name) and file.is_file():
            with storage_errors(file):
                file.unlink(missing_ok=True)


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state of tensors and plain values, atomically.

    Args:
        path: Where the file shall be.
        state: What `load_state` shall return: nested dictionaries, lists, tensors, plain values.

    Raises:
        InputError: If the state holds what `load_state` would refuse to read.
        StorageError: If the file cannot be written.
    """
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


def is_no_file(path: str | Path) -> bool:
    """Tell whether something else stands where a file should: to read a pipe may never end.

    Args:
        path: The place; it may be empty.

    Returns:
        Whether something other than a file is there.
    """
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # reading it says why
        return False


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a state.

    Args:
        path: A file that `save_state` or Lightning wrote. Only tensors and plain values are read
            from it, never code.

    Returns:
        The state, its tensors on the CPU, mapped from the file and read when they are used.

    Raises:
        InputError: If the file is missing, cut short or of another kind.
    """
    _require_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    # The reader of torch raises whatever damaged bytes lead it to.
    except Exception as error:
        raise _no_checkpoint(path, error) from error


def check_state(path: str | Path) -> None:
    """Make sure that no byte of a state has changed, by the checksums in it.

    Args:
        path: A file that `save_state` or Lightning wrote; it is read whole, once.

    Raises:
        InputError: If it is damaged.
    """
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
    """Write tensors to a safetensors file, atomically; the same content gives the same bytes.

    Args:
        path: Where the file shall be.
        tensors: What to write, of any shape, dtype and device. Tensors that share memory are
            written once for each name.
        metadata: Words to keep beside the tensors.
    """
    with atomic_write(path) as temporary:
        # Without tensors, an empty metadata table would make a header that nothing can read.
        save_file(_independent(tensors), temporary, dict(metadata) or None)
        _sort_metadata(temporary)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        InputError: If the file is missing, cannot be read, is truncated or is corrupt.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            f"'{path}' is not a whole safetensors file ({error}); it is corrupt, cut short or of "
            "another format: write or download it again"
        ) from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error})") from error


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detach and copy where needed: the format knows neither strides nor shared memory."""
    seen: set[int] = set()
    independent = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach()
        independent[name] = tensor.clone() if storage in seen else tensor
        independent[name] = independent[name].contiguous()
        seen.add(storage)
    return independent


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, where the writer's is another every time."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as it is the same text in another order; spaces fill up
            file.seek(8)
            file.write(text.ljust(length))


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


def _cannot_write(path: str | Path, reason: object) -> str:
    return f"'{path}' cannot be written ({reason}); nothing that was there before is lost"


def hidden_name(path: Path) -> Path:
    """Name what is not whole yet, beside where it will be; `remove_leftovers` knows such names.

    Args:
        path: What it will be called.

    Returns:
        A path in the same folder, another one every time.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names of a folder's files, have reached the disk.

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
