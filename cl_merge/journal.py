"""A journal of what is done, so that work that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from cl_merge.errors import InputError
from cl_merge.files import storage_errors


class Journal:
    """A file of JSON lines that only grows; a line is there whole or not at all.

    Every process reads it, the first one writes it. What the last line lost in a crash is left out
    when it is read, and cut off before the next line is written.

    Args:
        path: The file; made with the first record.

    Attributes:
        records: All records, in order.

    Raises:
        InputError: If a line other than the last is no record.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
        >>> Journal(path).append({"task": 0})
        >>> Journal(path).records
        [{'task': 0}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records, self._length = _read(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it has reached the disk when this returns.

        Args:
            record: Plain values: text, numbers (NaN and infinity too), lists, dictionaries.

        Raises:
            StorageError: If it cannot be written.
        """
        line = json.dumps(record) + "\n"
        # What later reads give, not what was passed: tuples are lists, keys are text.
        self.records.append(json.loads(line))
        self._write(line.encode())

    @rank_zero_only
    def _write(self, line: bytes) -> None:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._length)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._length += len(line)


@contextmanager
def only_process(folder: str | Path) -> Iterator[None]:
    """Hold a folder against other processes; the ranks of one run count as one.

    The lock goes with the process, however it ends.

    Args:
        folder: The folder; made if missing.

    Yields:
        Nothing.

    Raises:
        InputError: If another process holds it.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    folder = Path(folder)
    lock = FileLock(folder / ".lock")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{folder} is in use by another process; wait for it, or name another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many of its bytes they take."""
    if not path.exists():
        return [], 0
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    records, length = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
            length += len(line)
        elif number == len(lines):
            break
        else:
            raise InputError(
                f"{path}, line {number}, is no record of a journal; restore the file, or start "
                "again in a new folder"
            )
    return records, length
