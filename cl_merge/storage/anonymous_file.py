"""Files that no one sees until they are whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from typing_extensions import Buffer

from cl_merge.storage.files import hidden_name

# Where a file system cannot do what was asked, as opposed to will not.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class UnnamedFile:
    """A file that has no name while it is written, so that even a killed process leaves nothing.

    Where the file system has no such files, it is a hidden one that `files.remove_leftovers` knows.

    Args:
        folder: In which folder, or rather on which disk.
        name: What the file will be called.
        size: Bytes to reserve, so that a full disk shows now.

    Raises:
        OSError: If it cannot be made, or the disk is full.
    """

    def __init__(self, folder: Path, name: str, size: int) -> None:
        self._hidden: Path | None = None
        if unnamed_files_work(folder):
            self._handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
        else:
            self._hidden = hidden_name(folder / name)
            self._handle = os.open(self._hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            _reserve(self._handle, size)
        except BaseException:
            self.discard()
            raise

    def write(self, data: Buffer, offset: int) -> None:
        """Write bytes at an offset, from any thread."""
        rest = memoryview(data).cast("B")
        while len(rest):
            written = os.pwrite(self._handle, rest, offset)
            rest, offset = rest[written:], offset + written

    def flush(self) -> None:
        """Wait until everything has reached the disk."""
        os.fsync(self._handle)

    def publish(self, path: Path, replace: bool) -> None:
        """Give the file its name.

        Args:
            path: On the same disk.
            replace: Whether to take the place of a file that has that name.

        Raises:
            FileExistsError: If there is one, and it must not be replaced.
        """
        if self._hidden is not None:
            if not replace and os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            os.replace(self._hidden, path)
            self._hidden = None
        elif not replace:
            _link(self._handle, path)
        else:
            self._hidden = hidden_name(path)
            _link(self._handle, self._hidden)
            os.replace(self._hidden, path)
            self._hidden = None

    def discard(self) -> None:
        """Close the file, and remove it unless it was published."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)
            self._hidden = None


def unnamed_files_work(folder: Path) -> bool:
    """Try whether a file without a name can be made in a folder, and be given one later.

    Args:
        folder: One that exists.

    Returns:
        False on other systems than Linux, on file systems without them, and where the names of
        open files are not to be had.
    """
    if not hasattr(os, "O_TMPFILE"):
        return False
    trial = hidden_name(folder / "trial")
    try:
        handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:  # if it is not for want of support, the next attempt tells
        return False
    try:
        _link(handle, trial)
        trial.unlink()
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _link(handle: int, path: Path) -> None:
    # Without a folder's handle, Python calls the older `link`, which does not follow the link that
    # stands for the open file.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{handle}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _reserve(handle: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(handle, size)
