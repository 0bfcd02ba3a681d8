"""A progress bar that counts bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Tell = Callable[[int], None]


@contextmanager
def byte_progress(console: Console, what: str) -> Iterator[Callable[[int], Tell]]:
    """Show how many bytes were read, how fast, and how long the rest takes.

    Args:
        console: Where to show it; nothing is shown where that is no terminal.
        what: What is going on.

    Yields:
        A function that takes the number of bytes to come and returns what is told, from any
        thread, of bytes that were read.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:

        def begin(total: int) -> Tell:
            task = progress.add_task(what, total=total)
            return lambda number: progress.advance(task, number)

        yield begin
