"""How many bytes were read, for a progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

Progress = Callable[[int], Callable[[int], None]]
"""Given the number of bytes to come; returns what is told of bytes read, from several threads."""


class ByteCount:
    """Counts bytes from several threads, and tells a progress bar as many as were announced.

    Args:
        progress: The bar; None for none.
        total: How many bytes are to come.

    Attributes:
        read: How many were read, also beyond the total.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.read = 0
        self._to_come = total
        self._lock = threading.Lock()
        self._tell = progress(total) if progress is not None else None

    def took(self, values: Tensor) -> None:
        """Count values that were read."""
        number = values.numel() * values.element_size()
        with self._lock:
            self.read += number
            # What turns out to be needed once more was not announced.
            announced = min(number, self._to_come)
            self._to_come -= announced
        if self._tell is not None:
            self._tell(announced)
