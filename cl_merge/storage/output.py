"""Where an output may go."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cl_merge.errors import InputError
from cl_merge.storage.layouts import INDEX


def check_output(
    path: str | Path, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> None:
    """Make sure that an output can be written and harms no input; writes nothing.

    Args:
        path: Where `write_weights` shall write.
        inputs: What is read meanwhile: files and folders.
        overwrite: Whether a file that exists may be replaced. Folders never are.

    Raises:
        InputError: If something is there already, or it is, or lies within, an input.
    """
    path = Path(path)
    for given in inputs:
        source = Path(given)
        folder = source.parent if source.name.endswith(INDEX) else source
        if _real(path).is_relative_to(_real(folder)) or _is_same(path, source):
            raise InputError(
                f"the output '{path}' is, or lies within, the input '{source}'; give another place"
            )
    if is_file(path):
        _check_file(path, overwrite)
    else:
        _check_folder(path)


def is_file(path: Path) -> bool:
    """Tell whether an output is one file, and not a folder, by its name."""
    return path.suffix.lower() == ".safetensors"


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"the output '{path}' is a folder; give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"the output '{path}' exists; give another name, or allow overwriting")


def _check_folder(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InputError(
            f"the output '{path}' is a file; give a name that ends in .safetensors, or a folder"
        )
    if any(path.iterdir()):
        raise InputError(f"the output folder '{path}' is not empty; give a new or an empty folder")
    # The whole folder is put in its place in one step, which another disk cannot take.
    if os.path.ismount(path):
        raise InputError(f"the output '{path}' is where a disk is mounted; give a folder within it")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)
