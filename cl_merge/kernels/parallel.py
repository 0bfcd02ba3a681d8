"""Work on many pieces at once, in threads: torch and the kernels let go of Python meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREAD = threading.local()


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function to items, on as many threads as torch uses; results in the items' order.

    Within a thread torch's own threads are switched off: a piece that fits a core's cache stays
    there. After the first error, which is raised, no further item is begun.

    Example:
        >>> in_threads(abs, [-1, 2, -3])
        [1, 2, 3]
    """
    waiting = list(items)
    before = torch.get_num_threads()
    # A call from within a piece of work: the other threads are busy with such pieces.
    threads = 1 if getattr(_THREAD, "is_working", False) else min(before, len(waiting))
    if threads <= 1:
        return [function(item) for item in waiting]
    results: list[Any] = [None] * len(waiting)
    indices = iter(range(len(waiting)))  # shared by the threads: one `next` is atomic

    def work() -> None:
        _THREAD.is_working = True
        torch.set_num_threads(1)
        for index in indices:
            results[index] = function(waiting[index])

    try:
        with ThreadPoolExecutor(threads) as pool:
            try:
                running = [pool.submit(work) for _ in range(threads)]
                for ended in wait(running, return_when=FIRST_EXCEPTION).done:
                    ended.result()
            finally:  # after an error or Ctrl-C, what is under way ends and nothing new begins
                for _ in indices:
                    pass
    finally:
        torch.set_num_threads(before)
    return results
