"""Write checkpoints a stretch at a time; they appear when they are whole."""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from torch import Tensor
from typing_extensions import Buffer

from cl_merge.errors import InputError
from cl_merge.storage.files import appearing, remove_leftovers_of, storage_errors
from cl_merge.storage.layouts import (
    INDEX,
    PICKLE_INDEX,
    output_files,
    split_key,
    write_index,
)
from cl_merge.storage.safetensors_format import Entry, Header, raw_bytes, size_of
from cl_merge.storage.side_files import side_files
from cl_merge.storage.weights import Weights


@contextmanager
def write_weights(
    path: str | Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    *,
    like: Weights | None = None,
    file_name: str = "",
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Iterator[Writer]:
    """Write safetensors, a stretch at a time, so that they are there whole or not at all.

    Everything is written to a hidden file or folder beside `path`, which gets its name when the
    block has ended. If the block raises, nothing is left; if the process is killed, at most what is
    hidden, which the next write to `path` removes. The same content gives the same bytes.

    Args:
        path: A name that ends in ``.safetensors`` makes one file, any other a folder, with an index
            and several files if the weights are larger than `shard_bytes`. Missing parent folders
            are made.
        entries: Dtype and shape of each tensor, by name; folders keep this order from file to file.
        metadata: Words to keep beside the tensors; ``format`` is always ``pt``, as transformers
            demands.
        like: For a folder: whose names to use, and whose small files to copy, such as configuration
            and tokenizer; what stays behind is logged.
        file_name: For a folder that is like no other: how to name its file of weights.
        texts: For a folder: small files to write, by name, in place of copies.
        shard_bytes: In a folder, the most bytes of one file. open_clip reads no index: what is like
            an open_clip folder is always one file.
        overwrite: Whether a file that exists may be replaced.

    Yields:
        What to write to: every element of every tensor exactly once.

    Raises:
        InputError: If something is there already, safetensors cannot hold an entry, or what it is
            to be like has weights in subfolders.
        StorageError: If the disk is full or cannot be written to.
        RuntimeError: If the block ended without having written everything.

    Example::

        entries = {"weight": (torch.float32, (2, 3))}
        with write_weights("out.safetensors", entries, {}) as writer:
            writer.write("weight", 0, torch.ones(6))
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    metadata = {**metadata, "format": "pt"}
    target = path if _is_file(path) else Path(os.path.realpath(path))
    folder = like.folder if like is not None else None
    sizes = {name: size_of(entry) for name, entry in entries.items()}
    files, sides, texts = {path.name: list(entries)}, dict[Path, Path](), texts or {}
    if not _is_file(path):
        if like is not None and folder is not None:
            found, own = side_files(folder, like.file_name), {text.lower() for text in texts}
            sides = {s: folder / s for s in found if s.as_posix().lower() not in own}
        files = output_files(like.file_name if like and folder else file_name, sizes, shard_bytes)
    headers = {
        file: Header({n: entries[n] for n in names}, metadata) for file, names in files.items()
    }
    with storage_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers_of(target)
        # Let a disk that is too full show before the work begins.
        if shutil.disk_usage(target.parent).free < sum(header.size for header in headers.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with appearing(target, overwrite) as hidden, ExitStack() as opened:
        with storage_errors(path):
            if not _is_file(path):
                hidden.mkdir()
                if len(files) > 1:
                    write_index(hidden, files, sum(sizes.values()))
                for side, source in sides.items():
                    (hidden / side).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, hidden / side)
                for name, text in texts.items():
                    # Names of files, of which a card tells, may be no text.
                    (hidden / name).write_bytes(text.encode(errors="backslashreplace"))
            opened_files = [
                opened.enter_context(_NewFile(hidden if _is_file(path) else hidden / name, header))
                for name, header in headers.items()
            ]
        writer = Writer(path, opened_files, metadata)
        yield writer
        writer.check_complete()
        with storage_errors(path):
            opened.close()


def check_output(
    path: str | Path, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> None:
    """Make sure that `write_weights` can write to a path and harms none of the inputs."""
    path = Path(path)
    for given in inputs:
        source, _ = split_key(given)
        is_index = source.name.endswith((INDEX, PICKLE_INDEX))
        folder = source.parent if is_index else source
        real = Path(os.path.realpath(path))
        is_same = path.exists() and source.exists() and path.samefile(source)
        if is_same or real.is_relative_to(os.path.realpath(folder)):
            raise InputError(
                f"the output '{path}' is, or lies within, the input '{source}'; give another place"
            )
    if not os.path.lexists(path):
        return
    if _is_file(path):
        if path.is_dir():
            raise InputError(f"the output '{path}' is a folder; give the name of a file")
        if not overwrite:
            raise InputError(
                f"the output '{path}' exists; give another name, or overwrite=True (--overwrite)"
            )
        return
    if not path.is_dir():
        raise InputError(
            f"the output '{path}' is a file; give a name that ends in .safetensors, or a folder"
        )
    if any(path.iterdir()):
        raise InputError(f"the output folder '{path}' is not empty; give a new or an empty folder")
    # The whole folder is put in its place in one step, which another disk cannot take.
    if os.path.ismount(path):
        raise InputError(f"the output '{path}' is where a disk is mounted; give a folder within it")


class Writer:
    """Takes the values of the tensors that are being written; made by `write_weights`."""

    def __init__(self, path: Path, files: Sequence[_NewFile], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._files = files
        self._metadata = dict(metadata)
        self._file_of = {name: file for file in files for name in file.header.entries}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._file_of}
        self._write_headers()

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write a stretch of one tensor, from any thread and in any order.

        Args:
            name: Name of the tensor.
            start: Index of the first element, as if the tensor were flat.
            values: The elements, of the tensor's dtype, any shape and device.

        Raises:
            StorageError: If they cannot be written.
            RuntimeError: If there is no such stretch, or they are of another dtype.
        """
        file = self._file_of[name]
        dtype, shape = file.header.entries[name]
        stop = start + values.numel()
        if values.dtype != dtype or not 0 <= start <= stop <= math.prod(shape):
            raise RuntimeError(
                f"elements {start} to {stop} of '{name}' as {values.dtype} do not fit into {dtype} "
                f"{tuple(shape)}"
            )
        if start == stop:
            return
        with storage_errors(self._path):
            file.write(raw_bytes(values), file.header.offsets[name] + start * dtype.itemsize)
        self._written[name].append((start, stop))

    def amend(self, metadata: Mapping[str, str]) -> None:
        """Change metadata that is known only after the data.

        Args:
            metadata: New values of some keys, no longer than those that were there.

        Raises:
            StorageError: If they cannot be written.
            RuntimeError: If they are longer.
        """
        self._metadata |= metadata
        self._write_headers()

    def check_complete(self) -> None:
        """Make sure that every element was written exactly once, else raise `RuntimeError`."""
        for name, file in self._file_of.items():
            reached = 0
            for start, stop in sorted(self._written[name]):
                if start != reached:
                    break
                reached = stop
            else:
                if reached == math.prod(file.header.entries[name][1]):
                    continue
            raise RuntimeError(f"'{name}' was not written exactly once, around element {reached}")

    def _write_headers(self) -> None:
        with storage_errors(self._path):
            for file in self._files:
                file.write(file.header.encode(self._metadata), 0)


class _NewFile:
    """One new safetensors file, written at any offset from any thread."""

    def __init__(self, path: Path, header: Header) -> None:
        self.header = header
        self._file = path.open("xb", buffering=0)
        self._lock = threading.Lock()

    def write(self, data: Buffer, offset: int) -> None:
        rest = memoryview(data).cast("B")
        with self._lock:
            self._file.seek(offset)
            while rest:
                rest = rest[self._file.write(rest) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _is_file(path: Path) -> bool:
    """Whether an output is one file, and not a folder, by its name."""
    return path.suffix.lower() == ".safetensors"
