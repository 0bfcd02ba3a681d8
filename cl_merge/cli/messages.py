"""How the library's messages appear on the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(message: str) -> None:
    """Say one line on standard error, whatever control characters names have put into it.

    Args:
        message: What to say.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    sys.stderr.write(f"cl-merge: {shown}\n")


@contextmanager
def own_messages() -> Iterator[None]:
    """Let a command show messages in its way, and leave them to the caller's logging after it."""
    library = logging.getLogger("cl_merge")
    before = library.handlers, library.propagate, library.level
    try:
        yield
    finally:
        library.handlers, library.propagate, library.level = before


def show_messages(console: Console) -> None:
    """Let what the library has to say appear beside the progress bar instead of breaking it.

    Args:
        console: Where the progress bar is.
    """
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    library = logging.getLogger("cl_merge")
    library.handlers = [handler]
    library.propagate = False
    library.setLevel(logging.INFO)
