"""Write checkpoints a stretch at a time; they appear when they are whole."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cl_merge.errors import InputError
from cl_merge.storage.anonymous_file import UnnamedFile
from cl_merge.storage.dtypes import CODES
from cl_merge.storage.files import flush_to_disk, storage_errors, whole_folder
from cl_merge.storage.header import Entry, Header, size_of
from cl_merge.storage.layouts import (
    INDEX,
    index_text,
    output_stem,
    shard_entries,
    shard_names,
    side_files,
)
from cl_merge.storage.output import check_output, is_file
from cl_merge.storage.weights import Weights

_LONGEST_HEADER = 100_000_000  # what readers of safetensors accept


@contextmanager
def write_weights(
    path: str | Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    *,
    like: Weights | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Iterator[Writer]:
    """Write safetensors, a stretch at a time, so that they are there whole or not at all.

    The disk space is reserved before the block begins. The files get their names when the block
    has ended; if it raises, or the process is killed, nothing is left. The same content gives the
    same bytes.

    Args:
        path: A name that ends in ``.safetensors`` makes one file, any other a folder, with an index
            and several files if the weights are larger than `shard_bytes`. Missing parent folders
            are made.
        entries: Dtype and shape of each tensor, by name; folders keep this order from file to file.
        metadata: Words to keep beside the tensors; ``format`` is always ``pt``, without which
            transformers refuses a file.
        like: For a folder: whose names to use, and whose configuration and tokenizer to copy.
        shard_bytes: In a folder, the most bytes of one file. open_clip reads no index: what is like
            an open_clip folder is always one file.
        overwrite: Whether a file that exists may be replaced.

    Yields:
        What to write to: every element of every tensor exactly once.

    Raises:
        InputError: If something is there already, or safetensors cannot hold an entry.
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
    layouts = _layouts(path, entries, metadata, like, shard_bytes)
    place = path if is_file(path) else Path(os.path.realpath(path))
    with ExitStack() as files:
        with storage_errors(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            shards = {
                name: _Shard(_new_file(files, place, name, layout.size), layout)
                for name, layout in layouts.items()
            }
            parts = {name: shard.file for name, shard in shards.items()}
            if not is_file(path):
                parts |= _beside(files, place, layouts, like)
        writer = Writer(path, list(shards.values()), metadata)
        yield writer
        writer.check_whole()
        with storage_errors(path):
            for part in parts.values():
                part.flush()
            if is_file(path):
                parts[path.name].publish(place, overwrite)
            else:
                with whole_folder(place) as hidden:
                    for name, part in parts.items():
                        part.publish(hidden / name, replace=False)
            flush_to_disk(place.parent)


class Writer:
    """Takes the values of the tensors that are being written.

    Made by `write_weights`.
    """

    def __init__(self, path: Path, shards: Sequence[_Shard], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._shards = shards
        self._metadata = dict(metadata)
        self._homes = {name: shard for shard in shards for name in shard.layout.entries}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._homes}
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
        shard = self._homes[name]
        dtype, shape = shard.layout.entries[name]
        stop = start + values.numel()
        if values.dtype != dtype or not 0 <= start <= stop <= math.prod(shape):
            raise RuntimeError(
                f"elements {start} to {stop} of '{name}' as {values.dtype} do not fit into {dtype} "
                f"{tuple(shape)}"
            )
        if start == stop:
            return
        flat = values.detach().cpu().reshape(-1).contiguous()
        # One element counts as contiguous whatever its stride, which a view as bytes minds.
        raw = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
        with storage_errors(self._path):
            offset = shard.layout.offsets[name] + start * dtype.itemsize
            shard.file.write(raw.numpy().data, offset)
        self._written[name].append((start, stop))

    def amend(self, metadata: Mapping[str, str]) -> None:
        """Change metadata, where it is known only after the data.

        Args:
            metadata: New values of some keys, no longer than those that were there.

        Raises:
            StorageError: If they cannot be written.
            RuntimeError: If they are longer.
        """
        self._metadata |= metadata
        self._write_headers()

    def check_whole(self) -> None:
        """Make sure that every element was written exactly once.

        Raises:
            RuntimeError: If one was not.
        """
        for name, shard in self._homes.items():
            reached = 0
            for start, stop in sorted(self._written[name]):
                if start != reached:
                    break
                reached = stop
            else:
                if reached == math.prod(shard.layout.entries[name][1]):
                    continue
            raise RuntimeError(f"'{name}' was not written exactly once, around element {reached}")

    def _write_headers(self) -> None:
        with storage_errors(self._path):
            for shard in self._shards:
                shard.file.write(shard.layout.encode(self._metadata), 0)


class _Shard:
    """One safetensors file that is being written."""

    def __init__(self, file: UnnamedFile, layout: Header) -> None:
        self.file = file
        self.layout = layout


def _layouts(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    like: Weights | None,
    shard_bytes: int,
) -> dict[str, Header]:
    """Plan the files, by name."""
    for name, (dtype, _) in entries.items():
        if dtype not in CODES or name == "__metadata__":
            raise InputError(
                f"'{name}' of {dtype} cannot be written to a safetensors file; leave it out, or "
                "convert it to another dtype or name"
            )
    if is_file(path):
        return {path.name: _header(path, entries, metadata)}
    stem = output_stem(like.file_name if like is not None and like.folder is not None else "")
    sizes = {name: size_of(entry) for name, entry in entries.items()}
    most = math.inf if stem.startswith("open_clip") else shard_bytes
    groups = shard_entries(sizes, most)
    return {
        name: _header(path, {entry: entries[entry] for entry in group}, metadata)
        for name, group in zip(shard_names(stem, len(groups)), groups, strict=True)
    }


def _header(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Header:
    # Sorted so that every tensor is aligned, and the order given does not matter.
    ordered = dict(sorted(entries.items(), key=lambda e: (-e[1][0].itemsize, e[0])))
    header = Header(ordered, metadata)
    if header.data > _LONGEST_HEADER:
        raise InputError(
            f"the names of {len(entries)} tensors are too long for a safetensors file; write "
            "to a folder, with a smaller shard_bytes"
        )
    return header


def _beside(
    files: ExitStack, place: Path, layouts: Mapping[str, Header], like: Weights | None
) -> dict[str, UnnamedFile]:
    """Write what lies beside the weights in a folder: the index, and copies of the base's files."""
    texts = {}
    if len(layouts) > 1:
        homes = {name: file for file, layout in layouts.items() for name in layout.entries}
        total = sum(size_of(e) for layout in layouts.values() for e in layout.entries.values())
        stem = next(iter(layouts)).removesuffix(f"-00001-of-{len(layouts):05}.safetensors")
        texts[stem + INDEX] = index_text(homes, total).encode()
    if like is not None and like.folder is not None:
        texts |= {file.name: file.read_bytes() for file in side_files(like.folder)}
    written = {}
    for name, text in texts.items():
        written[name] = _new_file(files, place, name, len(text))
        written[name].write(text, 0)
    return written


def _new_file(files: ExitStack, place: Path, name: str, size: int) -> UnnamedFile:
    file = UnnamedFile(place.parent, name, size)
    files.callback(file.discard)
    return file
