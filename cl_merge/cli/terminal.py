"""What a command writes: lines, the library's messages, a progress bar, whatever the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from cl_merge.benchmarks.datasets.checking import Finding


def say(message: str) -> None:
    """Say one line on standard error, whatever control characters names have put into it."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    sys.stderr.write(f"cl-merge: {shown}\n")


def show_messages(console: Console) -> None:
    """Let what the library has to say appear beside the progress bar instead of breaking it."""
    library = logging.getLogger("cl_merge")
    library.handlers, library.propagate = [_Messages(console)], False
    library.setLevel(logging.INFO)


class _Messages(logging.Handler):
    """Prints messages; where no terminal wraps them each is one line, to be searched for."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        whole = not self.console.is_terminal
        try:
            self.console.print(self.format(record), soft_wrap=whole, markup=False, highlight=False)
        except Exception:
            # As every handler of logging: a message that cannot be shown ends no run.
            self.handleError(record)


def quieten() -> None:
    """Keep out of the way of the progress bar what a library says to its own developers."""
    clients = "httpx", "httpx2", "datasets", "huggingface_hub"
    for name in ("lightning.pytorch", "lightning.fabric", *clients):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*tensorboardX.*",
        # What the library does on purpose: no validation data, frozen batch norms.
        ".*but have no `val_dataloader`.*",
        ".*in eval mode at the start of training.*",
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)


def show_findings(console: Console, findings: Sequence[Finding]) -> int:
    """Show what a run needs and what there is of it; 1 if something differs or is missing."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("", "what", "expected", "found"):
        table.add_column(name, overflow="fold")
    table.add_column("", no_wrap=True)
    colours, before = {"ok": "green", "differs": "yellow", "missing": "red"}, ""
    for one in findings:
        subject, before = "" if one.subject == before else one.subject, one.subject
        state = Text(one.state, style=colours[one.state])
        table.add_row(*map(Text, (subject, one.what, one.expected, one.found)), state)
    console.print(table)
    counts = Counter(one.state for one in findings)
    told = ", ".join(f"{counts[state]} {state}" for state in colours if counts[state])
    console.print(f"{len(findings)} checks: {told}; nothing was trained", markup=False)
    return int(counts["ok"] < len(findings))


@contextmanager
def byte_progress(console: Console, doing: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Show how many bytes were read, how fast, and how long the rest takes; on a terminal only.

    It yields a function that takes the number of bytes to come, and returns one that is told, from
    any thread, of bytes that were read.
    """
    if not console.is_terminal:  # where older versions of rich print an empty line all the same
        yield lambda total: lambda number: None
        return
    from rich import progress as rich

    name, amount = rich.TextColumn("{task.description}"), (rich.BarColumn(), rich.DownloadColumn())
    pace = rich.TransferSpeedColumn(), rich.TimeRemainingColumn()
    with rich.Progress(name, *amount, *pace, console=console, transient=True) as progress:

        def begin(total: int) -> Callable[[int], None]:
            task = progress.add_task(doing, total=total)
            return lambda number: progress.advance(task, number)

        yield begin


@contextmanager
def own_terminal() -> Iterator[None]:
    """Let any text be written: to a closed stream, in any encoding, with a terminal of no width.

    After it streams, environment and logging are the caller's as they were.
    """
    library = logging.getLogger("cl_merge")
    with ExitStack() as after:
        for name in ("handlers", "propagate", "level"):
            after.callback(setattr, library, name, getattr(library, name))
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
