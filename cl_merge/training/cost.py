"""What a stretch of work costs: wall time and peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    def after(self, before: Cost) -> Cost:
        """The cost of two stretches of the same work, this one the later.

        Args:
            before: The earlier one.

        Returns:
            Their times added, the higher of their peaks.
        """
        return Cost(
            before.seconds + self.seconds,
            max(before.peak_memory, self.peak_memory),
            max(before.peak_device_memory, self.peak_device_memory),
        )


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block.

    Yields:
        A `Cost` that is filled in when the block ends.

    Example:
        >>> with measured() as cost:
        ...     total = sum(range(1000))
        >>> cost.seconds > 0 and cost.peak_memory > 0
        True
    """
    _reset_peak()
    cost, begin = Cost(), time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begin
        cost.peak_memory = _peak()
        if torch.cuda.is_available():
            cost.peak_device_memory = torch.cuda.max_memory_allocated()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # "5" resets the peak resident size of the process, see proc(5).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


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
    lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((int(line[1]) * 1024 for line in lines), 0)
