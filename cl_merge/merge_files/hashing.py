"""A hash of what a checkpoint holds, whatever kind of file holds it."""

from __future__ import annotations

import json
import threading
from collections import defaultdict

import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 22
"""Elements that are hashed together; a part of what the hash means."""


class ContentHash:
    """Hashes tensors as they are read: any block in any order, on any thread.

    The hash depends on names, shapes, dtypes and values alone: the same weights as one safetensors
    file, in shards, or in a PyTorch checkpoint have the same. It is made of XXH3-128, at the speed
    of memory, and tells whether two files hold the same; it is no signature.

    Example:
        >>> content = ContentHash()
        >>> content.add("weight", torch.float32, torch.Size([2]), 0, digest(torch.ones(2)))
        >>> content.hexdigest()
        '0a93220a8bd5af31c6ef0d41c98a1344'
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, str] = {}
        self._digests: dict[str, dict[int, bytes]] = defaultdict(dict)

    def add(
        self, name: str, dtype: torch.dtype, shape: torch.Size, start: int, digest: bytes
    ) -> None:
        """Add one block, or several that follow each other; an empty tensor has an empty digest.

        Args:
            name: Name of the tensor.
            dtype: Its dtype.
            shape: Its shape.
            start: Index of the first element, a multiple of `BLOCK`.
            digest: XXH3-128 of the block's bytes; one after another for several blocks.
        """
        with self._lock:
            self._kinds[name] = json.dumps([name, str(dtype), list(shape)])
            self._digests[name][start] = digest

    def hexdigest(self) -> str:
        """Finish, after all blocks of all tensors.

        Returns:
            32 hexadecimal digits.
        """
        total = xxhash.xxh3_128()
        for name in sorted(self._kinds):
            total.update(self._kinds[name].encode())
            for _, digest in sorted(self._digests[name].items()):
                total.update(digest)
        return total.hexdigest()


class BlockHash:
    """Hashes a stretch of a tensor from its chunks, one after another, block by block."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._hash = xxhash.xxh3_128()
        self._room = BLOCK

    def update(self, chunk: Tensor) -> None:
        """Add the next chunk, contiguous, of any dtype."""
        while chunk.numel():
            part, chunk = chunk[: self._room], chunk[self._room :]
            self._hash.update(part.view(torch.uint8).numpy().data)
            self._room -= part.numel()
            if self._room == 0:
                self._done.append(self._hash.digest())
                self._hash, self._room = xxhash.xxh3_128(), BLOCK

    def digest(self) -> bytes:
        """The hashes of the blocks so far, 16 bytes each, the last one perhaps not full."""
        rest = [self._hash.digest()] if self._room < BLOCK else []
        return b"".join(self._done + rest)


def digest(block: Tensor) -> bytes:
    """Hash a tensor at once.

    Args:
        block: Contiguous, [n], any dtype.

    Returns:
        16 bytes for each block.
    """
    whole = BlockHash()
    whole.update(block)
    return whole.digest()
