"""JSON as it is written and read: checked against a type, with an error that names the entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from cl_merge.errors import InputError
from cl_merge.storage.files import is_no_file


def read_json(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any] | None:
    """Read a file that holds an object, as plain values.

    Args:
        path: The file.
        kind: What it must be: a type that msgspec knows, such as a `msgspec.Struct`.

    Returns:
        The object; None if there is no such file.

    Raises:
        InputError: If it cannot be read, or is damaged; names the entry.
    """
    if is_no_file(path):
        raise InputError(f"'{path}' is no file; take it away")
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror})") from error
    return parse_json(content, path, kind)


def parse_json(content: bytes, path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """Make an object of what a file holds; as `read_json`."""
    try:
        found: dict[str, Any] = msgspec.json.decode(content)
        msgspec.convert(found, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged: {error}; restore it, or delete it") from error
    return found


def plain(value: Any) -> Any:
    """Turn a value into what JSON gives back; numbers that are not finite become None.

    Example:
        >>> plain({1: (0.5, float("nan"))})
        {'1': [0.5, None]}
    """
    return msgspec.json.decode(msgspec.json.encode(value))
