"""What stands before the data of a safetensors file: which tensors there are, and where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch

from cl_merge.errors import InputError
from cl_merge.storage.dtypes import CODES

Entry = tuple[torch.dtype, Sequence[int]]
"""Dtype and shape of a tensor."""


class Header:
    """The header of a file that is written piece by piece; the same content gives the same bytes.

    Args:
        entries: Dtype and shape of each tensor, by name, in the order of the data.
        metadata: Words to keep beside them; room is kept for as many bytes.

    Attributes:
        entries: As given.
        data: Offset of the first byte of data, a multiple of 8.
        offsets: Of each tensor's first byte.
        size: Bytes of the file.

    Raises:
        InputError: If a name is no text.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.entries = dict(entries)
        self._table: dict[str, dict[str, object]] = {}
        places, end = {}, 0
        for name, (dtype, shape) in self.entries.items():
            begin, end = end, end + size_of((dtype, shape))
            places[name] = begin
            self._table[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        length = len(self._text(metadata))
        self.data = 8 + length + -length % 8
        self.offsets = {name: self.data + begin for name, begin in places.items()}
        self.size = self.data + end

    def encode(self, metadata: Mapping[str, str]) -> bytes:
        """Make all that precedes the data.

        Args:
            metadata: What to write, no longer than what the header was made with.

        Returns:
            Length, table and spaces.

        Raises:
            RuntimeError: If it is longer.
        """
        text = self._text(metadata)
        if len(text) > self.data - 8:
            raise RuntimeError("the new metadata is longer than what was there")
        return (self.data - 8).to_bytes(8, "little") + text.ljust(self.data - 8)

    def _text(self, metadata: Mapping[str, str]) -> bytes:
        header = {"__metadata__": dict(sorted(metadata.items())), **self._table}
        try:
            return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a name of a tensor is no text ({error.object[:80]!r})") from error


def size_of(entry: Entry) -> int:
    """Bytes that a tensor takes.

    Args:
        entry: Its dtype and shape.

    Returns:
        The number.
    """
    dtype, shape = entry
    return math.prod(shape) * dtype.itemsize
