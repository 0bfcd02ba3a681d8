"""Work on many pieces at once, in threads: torch and the kernels let go of Python meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_HERE = threading.local()


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function to items, on as many threads as torch uses.

    Each thread works on one piece at a time, with torch's own threads switched off within it: a
    piece that fits a core's cache stays there, where torch would spread every operation over all
    cores.

    Args:
        function: Called once for each item; must not depend on the order of the calls.
        items: What to work on.

    Returns:
        The results in the order of the items.

    Raises:
        BaseException: The first one that a call raised; no further item is begun then.

    Example:
        >>> in_threads(abs, [-1, 2, -3])
        [1, 2, 3]
    """
    waiting = list(items)
    # A call from within a piece of work: the other threads are busy with such pieces.
    before = torch.get_num_threads()
    threads = 1 if getattr(_HERE, "working", False) else min(before, len(waiting))
    if threads <= 1:
        return [function(item) for item in waiting]
    work = _Work(function, waiting)
    # Until Python 3.13, `join` takes a thread for ended once Ctrl-C has interrupted it.
    ended = [threading.Event() for _ in range(threads)]
    helpers = [threading.Thread(target=work.help, args=(end,), daemon=True) for end in ended]
    try:
        for helper in helpers:
            helper.start()
        for end in ended:
            end.wait()
    except BaseException:  # Ctrl-C: what is under way ends, nothing new begins
        work.stop()
        raise
    finally:
        for helper, end in zip(helpers, ended, strict=True):
            if helper.ident is not None:
                end.wait()
                helper.join()
        torch.set_num_threads(before)
    if work.error is not None:
        raise work.error
    return work.results


class _Work:
    """Items that threads take from until none is left."""

    def __init__(self, function: Callable[[Any], Any], items: list[Any]) -> None:
        self._function = function
        self._items = items
        self._next = iter(range(len(items)))  # one `next` is atomic
        self.results: list[Any] = [None] * len(items)
        self.error: BaseException | None = None

    def help(self, end: threading.Event) -> None:
        """Take items and work on them, in a thread of its own; tell when there are no more."""
        _HERE.working = True
        try:
            torch.set_num_threads(1)
            for index in self._next:
                self.results[index] = self._function(self._items[index])
        except BaseException as error:  # raised again by the caller
            self.error = self.error or error
            self.stop()
        finally:
            end.set()

    def stop(self) -> None:
        """Begin no further item."""
        for _ in self._next:
            pass
