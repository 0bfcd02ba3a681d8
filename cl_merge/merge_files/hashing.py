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

    The hash depends on names, shapes, dtypes and values alone, not on the kind of file. It is made
    of XXH3-128, at the speed of memory, of `block` elements at a time; it is no signature.
    """

    def __init__(self, weights: Weights, block: int = BLOCK) -> None:
        self._weights = weights
        self._block = block
        # By name and index of the block; empty tensors have no blocks.
        self._running: dict[tuple[str, int], xxhash.xxh3_128] = {}
        self._digests = {
            (name, 0): b"" for name in weights.names if weights.shape(name).numel() == 0
        }

    def update(self, name: str, start: int, chunk: Tensor) -> None:
        """Add a chunk of a flattened tensor, contiguous; those of one block come in their order."""
        while chunk.numel():
            key = (name, start // self._block)
            part, chunk = chunk.tensor_split([self._block - start % self._block])
            running = self._running.setdefault(key, xxhash.xxh3_128())
            running.update(part.view(torch.uint8).numpy().data)
            start += part.numel()
            if start % self._block == 0 or start == self._weights.shape(name).numel():
                self._digests[key] = self._running.pop(key).digest()

    def hexdigest(self) -> str:
        """Finish, after all of all tensors was added: 32 hexadecimal digits."""
        total = xxhash.xxh3_128()
        before = None
        for (name, _), digest in sorted(self._digests.items()):
            if name != before:
                kind = [name, str(self._weights.dtype(name)), list(self._weights.shape(name))]
                total.update(json.dumps(kind).encode())
            total.update(digest)
            before = name
        return total.hexdigest()
