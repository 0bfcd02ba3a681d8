"""Where images are read from: files, folders, or the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.data.hub import HubError, read_hub
from cl_merge.errors import InputError

if TYPE_CHECKING:
    import datasets


def read_images(
    source: str | Path,
    *,
    revision: str | None = None,
    splits: Sequence[str] | None = None,
    local_copy: str = "give its folder: data=/path/to/folder",
) -> Mapping[str, datasets.Dataset]:
    """Read a data set with its splits from disk or from the hub.

    Args:
        source: A parquet file; a folder of parquet files, of images (``train/CLASS/x.jpg``,
            whatever the classes are called), or written by ``DatasetDict.save_to_disk``; or a hub
            id such as ``uoft-cs/cifar100``, where needed with its configuration, as in
            ``ufldl-stanford/svhn:cropped_digits``.
        revision: Which commit of a hub data set; the newest if None.
        splits: Of a hub data set, which splits to download; all if None.
        local_copy: How the user says where a local copy is, for messages.

    Returns:
        The splits by name.

    Raises:
        InputError: If nothing is there, nothing can be read, or the hub cannot be reached.

    Example:
        >>> read_images("/photos")  # doctest: +SKIP
        DatasetDict({train: ..., test: ...})
    """
    path = Path(source).expanduser()
    if path.exists():
        return _read_local(path)
    if not is_hub_id(source):
        raise InputError(f"'{source}', to read images from: no such file or folder")
    try:
        with without_bars():
            return read_hub(str(source), revision, splits)
    except HubError as error:
        raise InputError(
            f"'{source}', to read images from: neither a folder here nor to be had from the hub "
            f"({error}); to use a local copy (parquet files, folders of images, or written by "
            f"save_to_disk), {local_copy}"
        ) from error


def is_hub_id(source: str | Path) -> bool:
    """Whether a source of `read_images` has the form of a hub id, and is not on disk.

    Example:
        >>> is_hub_id("uoft-cs/cifar100"), is_hub_id("./cifar100"), is_hub_id("images.parquet")
        (True, False, False)
    """
    path = Path(source).expanduser()
    local = path.is_absolute() or str(source).startswith((".", "~")) or path.suffix == ".parquet"
    return not (local or path.exists())


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep `datasets` from showing progress bars: they would break the run's own."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_local(path: Path) -> Mapping[str, datasets.Dataset]:
    import datasets

    try:
        if path.is_file():
            return _load("parquet", data_files={"train": glob.escape(str(path))})
        if (path / "dataset_dict.json").exists():
            saved: Mapping[str, datasets.Dataset] = datasets.load_from_disk(str(path))
            return saved
        parquet: dict[str, list[str]] = {}
        for file in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
            parquet.setdefault(file.stem.split("-")[0], []).append(glob.escape(str(file)))
        if parquet:
            return _load("parquet", data_files=parquet)
        return _load("imagefolder", **_image_files(path))
    # The libraries below `datasets` raise their own errors for damaged files, with no common base.
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            f"{path}: cannot be read as a data set ({reason}); expected parquet files, or images "
            "in train/CLASS/ and test/CLASS/"
        ) from error


def _image_files(path: Path) -> dict[str, Any]:
    """Where the images of a folder are, as arguments for `datasets`."""
    from datasets.data_files import SPLIT_KEYWORDS

    # By itself `datasets` takes every folder for a split whose name has such a word, classes too.
    folders = sorted({below.parent for below in path.glob("*/*")})
    splits = {
        str(split): [
            f"{glob.escape(str(folder))}/**"
            for folder in folders
            if not set(words).isdisjoint(re.split("[-._ 0-9]+", folder.name))
        ]
        for split, words in SPLIT_KEYWORDS.items()
    }
    # A file with metadata for all splits lies beside their folders.
    if splits["train"] and not any(path.glob("metadata.*")):
        return {"data_files": {split: found for split, found in splits.items() if found}}
    return {"data_dir": glob.escape(str(path))}


def _load(*args: Any, **kwargs: Any) -> Mapping[str, datasets.Dataset]:
    import datasets

    with without_bars():
        found: Mapping[str, datasets.Dataset] = datasets.load_dataset(*args, **kwargs)
    return found
