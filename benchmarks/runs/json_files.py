"""Results as JSON: written so that every reader understands them, read with an error that helps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_merge.errors import InputError
from cl_merge.storage.files import is_no_file


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds an object.

    Args:
        path: The file.

    Returns:
        The object; None if there is no such file.

    Raises:
        InputError: If it cannot be read, or is damaged.
    """
    if is_no_file(path):
        raise InputError(f"'{path}' is no file; take it away")
    try:
        return parse_json(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror})") from error


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Make an object of what a file holds.

    Args:
        content: What it holds.
        path: Its place, for the error.

    Returns:
        The object.

    Raises:
        InputError: If it is damaged.
    """
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({error}); restore it, or delete it") from error
    if not isinstance(found, dict):
        raise InputError(f"'{path}' is damaged (no object); restore it, or delete it")
    return found


def plain(value: Any) -> Any:
    """Turn a value into what JSON gives back.

    Args:
        value: Mappings, sequences, texts and numbers.

    Returns:
        The same with null for numbers that are not finite: JSON has no NaN, and every reader
        understands null.

    Example:
        >>> plain({1: (0.5, float("nan"))})
        {'1': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
