"""A journal of finished work, so that what was stopped can resume."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from cl_merge.errors import InputError
from cl_merge.storage.files import is_no_file, storage_errors

# Folders held, with the process and the thread that hold them; a fork holds none.
_held: set[tuple[Path, int, int]] = set()


class Journal:
    """A file of JSON lines that only grows: every process reads it, the first one writes it.

    A last line that a crash cut short is left out when it is read, and cut off before the next one
    is written. Numbers, not finite ones too, come back as the same bits.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
        >>> Journal(path).append({"task": 0})
        >>> Journal(path).records
        [{'task': 0}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: list[dict[str, Any]]
        self.records, self._length = _read(self.path)

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The last record that holds these fields, among others; None if there is none."""
        fitting = (record for record in self.records[::-1] if fields.items() <= record.items())
        return next(fitting, None)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record of plain values; it has reached the disk when this returns.

        If it cannot be written, a `StorageError` says so, and it is not among `records` either.
        """
        line = json.dumps(record).encode() + b"\n"
        if is_first_process():
            with storage_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    if file.tell() > self._length:
                        file.truncate(self._length)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                self._length += len(line)
        # What later reads give, not what was passed: tuples are lists, keys are text.
        self.records.append(json.loads(line))


def is_first_process() -> bool:
    """Whether this is the process of a run that writes and prints."""
    return not getattr(rank_zero_only, "rank", 0)


@contextmanager
def only_process(folder: str | Path) -> Iterator[None]:
    """Hold a folder against other processes; the ranks of one run count as one.

    The lock goes with the process, however it ends. Who holds a folder may hold it once more. The
    folder is made if missing; `InputError` says that another process holds it.
    """
    folder = Path(folder)
    key = (folder.resolve(), os.getpid(), threading.get_ident())
    if not is_first_process() or key in _held:
        yield
        return
    lock = FileLock(folder / ".lock")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{folder} is in use by another process; wait for it, or name another folder"
            ) from None
        except NotImplementedError as error:  # older versions of filelock know no other lock
            raise InputError(
                f"{folder} is on a file system without locks; name a folder elsewhere, or: "
                "pip install -U filelock"
            ) from error
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        lock.release()


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many of its bytes they take."""
    if not path.exists():
        return [], 0
    if is_no_file(path):
        raise InputError(f"{path} is no file; take it away, or name another folder")
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    records, length = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
            length += len(line)
        elif number < len(lines):
            raise InputError(
                f"{path}, line {number}, is no record of a journal; restore the file, or start "
                "again in a new folder"
            )
    return records, length
