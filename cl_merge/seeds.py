"""Seeds for everything random, each derived from what it is for instead of from what ran before."""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: int | str) -> int:
    """Turn what random numbers are for into their seed.

    A seed made of (run, task, epoch, image) depends on nothing else: not on the number of
    processes, not on what was computed before, not on whether a run was interrupted.

    Args:
        *parts: For example seed, parameter name and task; the order matters.

    Returns:
        A seed, 0 to 2^64 - 1; the same on every machine, unrelated to those of similar parts.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
