"""A hash of what a checkpoint holds, whatever kind of file holds it."""

from __future__ import annotations

import json

import torch
import xxhash
from torch import Tensor

from cl_merge.storage import Weights

BLOCK = 1 << 22
"""Elements that are hashed together; a part of what the hash means."""


class ContentHash:
    """Hashes the tensors of a checkpoint as they are read: in any order, on any thread.

    The hash depends on names, shapes, dtypes and values alone: the same weights as one safetensors
    file, in shards, or in a PyTorch checkpoint have the same. It is made of XXH3-128, at the speed
    of memory, and tells whether two files hold the same; it is no signature.

    Args:
        weights: The checkpoint; what it holds is added with `stretch`.
        block: Elements that are hashed together.
    """

    def __init__(self, weights: Weights, block: int = BLOCK) -> None:
        self.block = block
        self._weights = weights
        # By name and first element; empty tensors have no stretches.
        self._digests = {
            (name, 0): b"" for name in weights.names if weights.shape(name).numel() == 0
        }

    def stretch(self, name: str, start: int) -> StretchHash:
        """Begin to hash a stretch of a flattened tensor; `start` is a multiple of the block."""
        return StretchHash(self, name, start)

    def add(self, name: str, start: int, digests: bytes) -> None:
        """Add the digests, 16 bytes each, of the blocks of a stretch."""
        self._digests[name, start] = digests

    def hexdigest(self) -> str:
        """Finish, after all stretches of all tensors: 32 hexadecimal digits."""
        total = xxhash.xxh3_128()
        before = None
        for (name, _), digests in sorted(self._digests.items()):
            if name != before:
                kind = [name, str(self._weights.dtype(name)), list(self._weights.shape(name))]
                total.update(json.dumps(kind).encode())
            total.update(digests)
            before = name
        return total.hexdigest()


class StretchHash:
    """Hashes a stretch of a tensor from its chunks, one after another, block by block."""

    def __init__(self, content: ContentHash, name: str, start: int) -> None:
        self._content, self._name, self._start = content, name, start
        self._done: list[bytes] = []
        self._hash = xxhash.xxh3_128()
        self._room = content.block

    def update(self, chunk: Tensor) -> None:
        """Take the next chunk, contiguous, of any dtype."""
        while chunk.numel():
            part, chunk = chunk[: self._room], chunk[self._room :]
            self._hash.update(part.view(torch.uint8).numpy().data)
            self._room -= part.numel()
            if self._room == 0:
                self._done.append(self._hash.digest())
                self._hash, self._room = xxhash.xxh3_128(), self._content.block

    def finish(self) -> None:
        """Add what was hashed to the checkpoint's hash."""
        rest = [self._hash.digest()] if self._room < self._content.block else []
        self._content.add(self._name, self._start, b"".join(self._done + rest))
