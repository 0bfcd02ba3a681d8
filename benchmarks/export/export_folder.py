"""Where an export goes: a new folder, there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cl_merge.errors import InputError
from cl_merge.storage.files import atomic_folder, storage_errors
from cl_merge.storage.output import check_output


@contextmanager
def export_folder(output: str | Path, source: Path) -> Iterator[Path]:
    """Make a folder whose name appears when everything is in it.

    Args:
        output: The new folder; it may exist, empty. Missing parents are made.
        source: A folder that it must not lie in.

    Yields:
        Where to write meanwhile, beside the output; removed if the block raises.

    Raises:
        InputError: If something is there already.
        StorageError: If it cannot be written.
    """
    path = Path(output).expanduser()
    if path.suffix == ".safetensors":
        raise InputError(f"the output '{path}' is named like a file; an export is a folder")
    check_output(path, [source])
    place = Path(os.path.realpath(path))
    with storage_errors(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(place) as temporary:
            yield temporary
