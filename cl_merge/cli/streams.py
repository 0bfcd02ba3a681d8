"""Standard output and error, whatever the surroundings have made of them."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def make_writable() -> None:
    """Let any text be written: to a stream that is closed, or whose encoding lacks characters."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            # Names of files may hold bytes that are no text.
            stream.reconfigure(errors="backslashreplace")


def is_unread() -> bool:
    """Find out whether nobody reads standard output any more, as behind ``| head``.

    If so, nothing more is written to it, so that Python says nothing of it at its end.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
