"""What a stretch of work costs: wall time and peak memory."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Cost:
    """Cost of a stretch of work in this process.

    Attributes:
        seconds: Wall time.
        peak_memory: Highest resident memory in bytes. On Linux within the stretch; elsewhere since
            the process began; 0 on Windows.
        peak_device_memory: Highest memory allocated on the GPU within the stretch, in bytes; 0
            without one.
    """

    seconds: float = 0.0
    peak_memory: int = 0
    peak_device_memory: int = 0


class Meter:
    """Measure from now on; `before` is what the same work took before it was interrupted.

    Example:
        >>> meter = Meter()
        >>> total = sum(range(1000))
        >>> meter.read().seconds > 0
        True
    """

    def __init__(self, before: Cost | None = None) -> None:
        self._before = before or Cost()
        _reset_peak()
        self._begin = time.perf_counter()

    def read(self) -> Cost:
        """What the work has taken so far: times added, the highest of the peaks."""
        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return Cost(
            self._before.seconds + time.perf_counter() - self._begin,
            max(self._before.peak_memory, _peak()),
            max(self._before.peak_device_memory, on_device),
        )


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        # "5" resets the peak resident size of the process, see proc(5).
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        try:
            import resource
        except ImportError:  # on Windows
            return 0
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else highest * 1024
    found = re.search(r"VmHWM:\s*(\d+)", status)
    return int(found[1]) * 1024 if found else 0
