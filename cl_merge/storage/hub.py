"""Models of the Hugging Face hub, by their ids."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cl_merge.errors import InputError
from cl_merge.storage.layouts import PICKLES

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# Weights, what describes them, the tokenizer, and what the authors say of them.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
_PICKLED = ["*.bin"]
# The same weights once more.
_COPIES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


def is_hub_id(path: Path) -> bool:
    """Whether something is no path here but has the form of an id, ``org/name`` with ``@revision``.

    Names of files of weights, and names within a folder that is there, are paths.

    Example:
        >>> is_hub_id(Path("openai/clip-vit-base-patch16@main")), is_hub_id(Path("runs/task0.pt"))
        (True, False)
    """
    word = path.as_posix()
    is_file = word.lower().endswith((".safetensors", *PICKLES))
    if is_file or path.exists() or not _ID.fullmatch(word):
        return False
    return not Path(word.partition("/")[0]).is_dir()


def short_names(paths: Sequence[Path]) -> list[str]:
    """What to call checkpoints elsewhere: by their ids, or by the names of their files or folders.

    Different ones of one name have as many folders before it as tell them apart.
    """
    # Of "." and "..", too, the name is that of the folder.
    every = [Path(os.path.abspath(path)).parts for path in paths]

    def short(own: tuple[str, ...]) -> str:
        others = [parts for parts in every if parts != own]
        count = 1
        while any(parts[-count:] == own[-count:] for parts in others):
            count += 1
        return Path(*own[-count:]).as_posix()

    return [
        path.as_posix() if is_hub_id(path) else short(parts)
        for path, parts in zip(paths, every, strict=True)
    ]


def download(path: Path) -> Path:
    """Download what is needed of a model, unless it is in the cache of the hub; returns the folder.

    Where ``HF_HUB_OFFLINE`` is set only the cache is looked into.

    Raises:
        InputError: If the hub does not give it, or `huggingface_hub` is not installed.
    """
    missing = f"there is no file or folder '{path.as_posix()}'"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{missing}; to take it from the Hugging Face hub: pip install huggingface_hub"
        ) from error
    found = _ID.fullmatch(path.as_posix())
    assert found is not None  # noqa: S101 - `is_hub_id` has looked
    get = partial(
        snapshot_download, found["repo"], revision=found["revision"], ignore_patterns=_COPIES
    )
    try:
        folder = Path(get(allow_patterns=_FILES))
        if not any(folder.rglob("*.safetensors")):
            get(allow_patterns=_PICKLED)
    # Of the hub, of its cache and of the library for connections below, which have no common base.
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{missing}, and the Hugging Face hub does not give it: {said}") from error
    return folder
