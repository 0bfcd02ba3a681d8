"""Work that was begun and did not end, and the signals that end it."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


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


class Signals:
    """What a command was told from outside.

    Attributes:
        terminated: Whether something, such as a scheduler, asked it to end.
    """

    def __init__(self) -> None:
        self.terminated = False
        self._lost = False

    def _terminate(self, *_: object) -> None:
        # Schedulers say it more than once, and an end that is under way shall not be disturbed.
        if not self.terminated or self._lost:
            self.terminated, self._lost = True, False
            raise KeyboardInterrupt

    def _again(self) -> None:
        """Interrupt once more, a moment later: within a destructor Python ignores exceptions."""
        self._lost = True
        number = signal.SIGTERM if self.terminated else signal.SIGINT
        later = threading.Timer(0.05, _thread.interrupt_main, [number])
        later.daemon = True
        later.start()


@contextmanager
def terminated_as_interrupted() -> Iterator[Signals]:
    """Let SIGTERM end a command as Ctrl-C does, and neither be lost.

    Lightning calls this handler from its own while it trains.

    Yields:
        What was heard.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def unraisable(found: UnraisableHookArgs) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            signals._again()
        else:
            hook(found)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    former = signal.getsignal(signal.SIGTERM)
    if former is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signals._terminate)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, former)
        sys.unraisablehook = hook
