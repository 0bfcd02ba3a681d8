"""The process of a command: the signals that end it, and the threads that compute for it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Turns of the loop in which a thread waits; without a setting GNU's library makes 300,000.
_SPINS = "10000"


class StoppedError(Exception):
    """Work that was begun and did not end: the command that goes on, and what it raised."""


class Signals:
    """What a command was told from outside; `terminated` is whether it was asked to end."""

    def __init__(self) -> None:
        self.terminated = False
        self._lost = False

    def terminate(self, *_: object) -> None:
        """Handle SIGTERM."""
        # Schedulers say it more than once, and an end that is under way shall not be disturbed.
        if not self.terminated or self._lost:
            self.terminated, self._lost = True, False
            raise KeyboardInterrupt

    def repeat(self) -> None:
        """Interrupt once more, a moment later."""
        self._lost = True
        number = signal.SIGTERM if self.terminated else signal.SIGINT
        later = threading.Timer(0.05, _thread.interrupt_main, [number])
        later.daemon = True
        later.start()


@contextmanager
def terminated_as_interrupted() -> Iterator[Signals]:
    """Let SIGTERM end a command as Ctrl-C does, also where Ctrl-C is ignored; neither gets lost.

    Lightning calls this handler from its own while it trains. Within a destructor Python ignores
    exceptions: an interruption that comes there is repeated.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            signals.repeat()
        else:
            hook(found)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    former = signal.getsignal(signal.SIGTERM)
    if former is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signals.terminate)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, former)
        sys.unraisablehook = hook


def share_cores() -> None:
    """Let threads of GNU OpenMP, such as torch's, give their core away soon while they wait.

    By default they look for work for milliseconds. Where other processes want the same cores, those
    that still have work are kept from it, and a step of a small model takes a hundred times as
    long. Settings that the user has made stay. To be called before torch is imported.

    Reference:
        GNU libgomp, environment variables OMP_WAIT_POLICY and GOMP_SPINCOUNT.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
