"""What lies beside the weights of a folder and goes along with them: configuration, tokenizer."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cl_merge.errors import InputError, listing
from cl_merge.storage.layouts import (
    INDEX,
    PICKLE_INDEX,
    PICKLES,
    check_inside,
    is_weights,
    read_index,
)

log = logging.getLogger(__name__)

_LARGEST = 64 << 20
# The same weights for other libraries, which merging leaves as they were.
_EXPORT = re.compile(
    r".*\.(onnx|onnx_data|onnx\.data|msgpack|h5|keras|gguf|tflite|ot|pdparams|pb|mlmodel|engine)"
    r"|openvino.*"
)
# Of a training, or the same weights once more, as the folders of Llama have them.
_LEFTOVER = re.compile(
    r"checkpoint-\d+|global_step\d+|original|runs|wandb|lightning_logs|__pycache__"
)


def side_files(folder: Path, weights: str) -> list[Path]:
    """List the small files that make a folder of weights usable, and log what stays behind.

    Hidden files and folders stay behind without a word.

    Args:
        folder: The folder.
        weights: Name of its file of weights, or of their index.

    Returns:
        Paths within the folder, such as ``config.json`` and ``1_Pooling/config.json``, sorted.

    Raises:
        InputError: If there are other weights in subfolders, which would be those of the base
            beside merged ones.
    """
    merged = {folder / weights}
    if weights.endswith((INDEX, PICKLE_INDEX)):
        merged |= set(read_index(folder / weights))
    along, unmerged = [], []
    behind: list[str] = []
    homes = {file.parent for file in merged}
    for path in _walk(folder, behind):
        name = path.relative_to(folder).as_posix()
        if path in merged:
            continue
        if is_weights(path.name) and path.parent not in homes:
            unmerged.append(name)
        elif _goes_along(path, folder):
            along.append(Path(name))
        else:
            behind.append(name)
    if unmerged:
        raise InputError(
            f"folder '{folder}' has weights in subfolders ({listing(unmerged)}), which would stay "
            "those of the base; merge each subfolder by itself, and this one to a file that ends "
            "in .safetensors"
        )
    if behind:
        log.info("'%s': left behind %s", folder, listing(sorted(behind), limit=20))
    return sorted(along)


def _walk(folder: Path, behind: list[str]) -> Iterator[Path]:
    """Go through the files of a folder; names of subfolders that stay behind are added."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        names = [name for name in names if not name.startswith(".") and (here / name).is_file()]
        exported = any(_EXPORT.fullmatch(name) for name in names)
        if here != folder and exported and not any(is_weights(name) for name in names):
            behind.append(f"{here.relative_to(folder).as_posix()}/")
            folders.clear()
            continue
        inner = [name for name in folders if not name.startswith(".")]
        left = [n for n in inner if _LEFTOVER.fullmatch(n) or (here / n).is_symlink()]
        behind += [f"{(here / name).relative_to(folder).as_posix()}/" for name in left]
        folders[:] = sorted(set(inner) - set(left))
        yield from (here / name for name in sorted(names))


def _goes_along(file: Path, folder: Path) -> bool:
    name = file.name.lower()
    if name.endswith((".safetensors", ".index.json", *PICKLES)) or _EXPORT.fullmatch(name):
        return False
    try:
        check_inside(file, folder)
    except InputError:
        return False
    return file.stat().st_size <= _LARGEST
