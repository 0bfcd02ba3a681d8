"""The states of callbacks in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback

from cl_merge.errors import InputError, listing


def state_of(callback: Callback, saved: Mapping[Any, Any]) -> Any:
    """The state of a callback among those saved, by key; None if it has none.

    Raises:
        InputError: If there is one of the same callback, but of another method or other options.
    """
    # Options are behind all else in a key, and were not in it at first.
    former = callback._legacy_state_key
    if (key := callback.state_key) in saved or former in saved:
        return saved.get(key, saved.get(former))
    name = type(callback).__qualname__
    others = [other for other in saved if str(other).partition("{")[0] == name]
    if others:
        raise InputError(
            f"the checkpoint has the state of {listing(others)}, but this is {key}; make it with "
            "the saved options"
        )
    return None
