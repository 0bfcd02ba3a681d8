"""Standard output and error, whatever the surroundings have made of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO


@contextmanager
def writable_streams() -> Iterator[None]:
    """Let any text be written: to a closed stream, in any encoding, with a terminal of no width.

    Yields:
        Nothing; after it all is the caller's as it was.
    """
    with ExitStack() as after:
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            if stream is None:
                null = after.enter_context(open(os.devnull, "w", encoding="utf-8"))
                setattr(sys, name, null)
                after.callback(setattr, sys, name, None)
            elif stream is getattr(sys, f"__{name}__"):
                # Names of files may hold bytes that are no text.
                after.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        if os.environ.get("COLUMNS") == "0":
            # As some schedulers set it; on lines of no width nothing would be shown.
            del os.environ["COLUMNS"]
            after.callback(os.environ.__setitem__, "COLUMNS", "0")
        # To configure a stream is to flush it, which must not fail.
        after.callback(is_unread)
        yield


def is_unread() -> bool:
    """Find out whether nobody reads standard output any more, as behind ``| head``.

    If so, nothing more is written to it, so that Python says nothing of it at its end.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return True
    return False
