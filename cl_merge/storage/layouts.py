"""How folders hold weights: names of files, indices of shards, and what lies beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cl_merge.errors import InputError, listing
from cl_merge.storage.pickled import SUFFIXES
from cl_merge.storage.safetensors_format import once_each

INDEX = ".safetensors.index.json"

# What libraries look for, in the order of preference; two of one group are two checkpoints.
_USUAL = (
    (
        "model.safetensors",
        "model" + INDEX,
        "open_clip_model.safetensors",
        "open_clip_model" + INDEX,
    ),
    ("pytorch_model.bin", "open_clip_pytorch_model.bin"),
)
# Of torch.save, but no weights.
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")

_LARGEST_SIDE_FILE = 64 << 20
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".tiktoken")
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE")


def find_weights(folder: Path) -> Path:
    """Find the one file of weights in a folder: safetensors, their index, or of `torch.save`."""
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.lower().endswith(SUFFIXES)]
    for group in (
        [name for name in _USUAL[0] if name in names],
        [name for name in names if name.endswith(INDEX)],
        tensors,
        [name for name in _USUAL[1] if name in names],
        [name for name in pickles if not name.startswith(_TRAINING)],
    ):
        if len(group) > 1:
            raise InputError(
                f"folder '{folder}' holds several files of weights and no index that joins them "
                f"({listing(group)}); give the one that is meant"
            )
        if group:
            check_inside(folder / group[0], folder)
            return folder / group[0]
    raise InputError(
        f"folder '{folder}' holds no weights; expected model.safetensors, "
        f"open_clip_model.safetensors, model{INDEX} or a checkpoint of torch.save"
    )


def read_index(path: Path) -> dict[Path, list[str]]:
    """Read the index of sharded safetensors files: the names of each file's tensors."""
    shards: dict[Path, list[str]] = {}
    for name, file in _weight_map(path).items():
        shards.setdefault(_shard(path, file), []).append(name)
    return dict(sorted(shards.items()))


def check_inside(file: Path, folder: Path) -> None:
    """Make sure that a file of a folder is not a link to one elsewhere.

    Folders are downloaded from strangers; a link would make a merge read, or copy, what is not
    theirs. The cache of the Hugging Face hub is an exception: there every file of a model's
    ``snapshots/REVISION`` is a link to the ``blobs`` of the same model.
    """
    # Not `Path.resolve`, which raises on links that go in circles.
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    if not (real.is_relative_to(home) or real.is_relative_to(_blobs(home) or home)):
        raise InputError(
            f"'{file}' leads out of its folder, to '{real}'; put the file itself there"
        )


def side_files(folder: Path) -> list[Path]:
    """List the small files that make a folder of weights usable: configuration and tokenizer."""
    return [file for file in sorted(folder.iterdir()) if _goes_along(file, folder)]


def output_stem(name: str) -> str:
    """Name the weights, without an ending, as another folder's file or index `name` is named."""
    for ending in (INDEX, ".safetensors"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return "open_clip_model" if name.startswith("open_clip") else "model"


def shard_entries(sizes: Mapping[str, int], most: float) -> list[list[str]]:
    """Distribute tensors over files, in order; at least one file, empty if there are no tensors.

    Args:
        sizes: Bytes of each tensor.
        most: The most bytes of a file, which only a tensor that is larger itself exceeds.

    Returns:
        The names of each file's tensors.
    """
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > most:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def shard_names(stem: str, number: int) -> list[str]:
    """Name the files of a folder, as the hub does."""
    if number == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05}-of-{number:05}.safetensors" for i in range(number)]


def index_text(files: Mapping[str, str], total: int) -> str:
    """Make the index of sharded files, from the file of each tensor and the bytes of all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=once_each)
        table: Any = index["weight_map"]
        if not all(isinstance(file, str) for file in table.values()):
            raise TypeError("a name of a file is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"'{path}' is no index of safetensors files ({error}); expected JSON with a "
            "'weight_map' that names each tensor once, with its file: write or download it again"
        ) from error
    return dict(table)


def _shard(index: Path, name: str) -> Path:
    """Find a file that an index names."""
    parts = PurePosixPath(name)
    plain = not parts.is_absolute() and ".." not in parts.parts and name.isprintable()
    if not plain or "\\" in name or not name.endswith(".safetensors"):
        raise InputError(
            f"'{index}' names the file {name!r}; expected a .safetensors file in the same folder"
        )
    file = index.parent / name
    check_inside(file, index.parent)
    if not file.is_file():
        raise InputError(f"'{file}' is missing, but '{index.name}' names it; download it again")
    return file


def _blobs(home: Path) -> Path | None:
    """Where the cache of the hub keeps the files of a model's revision."""
    for model in home.parents:
        if model.name.startswith("models--") and home.is_relative_to(model / "snapshots"):
            return model / "blobs"
    return None


def _goes_along(file: Path, folder: Path) -> bool:
    name = file.name
    if name.startswith(".") or not file.is_file() or name.endswith(".index.json"):
        return False
    if not (name.lower().endswith(_SIDE_SUFFIXES) or name.startswith(_SIDE_NAMES)):
        return False
    try:
        check_inside(file, folder)
    except InputError:
        return False
    return file.stat().st_size <= _LARGEST_SIDE_FILE
