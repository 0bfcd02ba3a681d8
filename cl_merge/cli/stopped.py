"""Work that was begun and did not end."""

from __future__ import annotations


class StoppedError(Exception):
    """Work that was begun and did not end, for a reason outside of it.

    Args:
        again: The command that goes on.
        reason: What stopped it.
    """

    def __init__(self, again: str, reason: BaseException) -> None:
        super().__init__(again, reason)
        self.again = again
        self.reason = reason
