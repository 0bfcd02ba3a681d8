"""How files and folders hold weights: their names, keys in a file, and indices of shards."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from cl_merge.errors import InputError, listing
from cl_merge.storage.safetensors_format import once_each

T = TypeVar("T")

log = logging.getLogger(__name__)

INDEX = ".safetensors.index.json"
PICKLE_INDEX = ".bin.index.json"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
"""How the names of files of `torch.save` end."""

# What libraries look for, in the order of preference; two of one group are two checkpoints.
_MODELS = [stem + end for stem in ("model", "open_clip_model") for end in (".safetensors", INDEX)]
_TORCH = ["pytorch_model.bin", f"pytorch_model{PICKLE_INDEX}", "open_clip_pytorch_model.bin"]
# Of torch.save, but no weights.
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")


def split_key(path: str | Path) -> tuple[Path, str]:
    """Split ``file.pt:KEY`` where there is a file or folder of the first name, but none of both.

    Example:
        >>> split_key("C:/none.pt")[1]
        ''
    """
    path = Path(path)
    file, _, key = str(path).rpartition(":")
    if file and key and not path.exists() and Path(file).exists():
        return Path(file), key
    return path, ""


def find_weights(folder: Path) -> Path:
    """Find the one file of weights in a folder: safetensors, their index, or of `torch.save`."""
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    pickles = [name for name in names if name.lower().endswith(PICKLES) and is_weights(name)]
    for group in (
        [name for name in _MODELS if name in names],
        [name for name in names if name.endswith(INDEX)],
        [name for name in names if name.endswith(".safetensors")],
        [name for name in _TORCH if name in names],
        [name for name in names if name.endswith(PICKLE_INDEX)],
        pickles,
    ):
        whole = [name for name in group if not name.endswith((INDEX, PICKLE_INDEX))]
        if len(group) > len(whole) > 0:
            raise InputError(
                f"folder '{folder}' holds both a checkpoint in one file and the index of one in "
                f"shards ({listing(group)}); give the one that is meant, as in "
                f"{folder / group[0]}"
            )
        if len(group) > 1:
            raise InputError(
                f"folder '{folder}' holds several files of weights and no index that joins them "
                f"({listing(group)}); give the one that is meant"
            )
        if group:
            check_inside(folder / group[0], folder)
            return folder / group[0]
    inner = sorted({file.parent.name for file in folder.glob("[!.]*/*") if is_weights(file.name)})
    hint = f". Its subfolders hold some: give one of them ({listing(inner)})" if inner else ""
    raise InputError(
        f"folder '{folder}' holds no weights; expected model.safetensors, "
        f"open_clip_model.safetensors, model{INDEX} or a checkpoint of torch.save{hint}"
    )


def is_weights(name: str) -> bool:
    """Whether a file holds weights that can be merged, by its name."""
    if name.lower().endswith(PICKLES):
        return not name.startswith((*_TRAINING, "openvino"))
    return name.lower().endswith(".safetensors")


def read_index(path: Path) -> dict[Path, list[str]]:
    """Read the index of sharded files: the names of each file's tensors."""
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=once_each)
        files: dict[str, Any] = dict(index["weight_map"].items())
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("a name of a file is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"'{path}' is no index of files of weights ({error}); expected JSON with a "
            "'weight_map' that names each tensor once, with its file: write or download it again"
        ) from error
    shards: dict[Path, list[str]] = {}
    for name, file in files.items():
        shards.setdefault(_shard(path, file), []).append(name)
    return dict(sorted(shards.items()))


def in_shard(path: Path, index: Path, names: Sequence[str], held: Mapping[str, T]) -> dict[str, T]:
    """What a shard holds of the tensors that the index says; others are left out, and named."""
    missing, extra = [name for name in names if name not in held], sorted(set(held) - set(names))
    if missing:
        raise InputError(
            f"'{path}' does not hold what '{index.name}' says; missing: {listing(missing)}. "
            "Download both again"
        )
    if extra:
        log.warning(
            "left out of '%s', as '%s' does not say so: %s", path, index.name, listing(extra)
        )
    return {name: held[name] for name in names}


def check_inside(file: Path, folder: Path) -> None:
    """Make sure that a file of a downloaded folder is not a link to one elsewhere.

    The cache of the Hugging Face hub is an exception: there every file of a model's
    ``snapshots/REVISION`` is a link to the ``blobs`` of the same model.
    """
    # Not `Path.resolve`, which raises on links that go in circles.
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    if not (real.is_relative_to(home) or real.is_relative_to(_blobs(home) or home)):
        raise InputError(
            f"'{file}' leads out of its folder, to '{real}'; put the file itself there"
        )


def output_files(like: str, sizes: Mapping[str, int], shard_bytes: float) -> dict[str, list[str]]:
    """Distribute tensors over at least one file, in order, named as another file of weights is.

    Only a tensor that is larger itself makes a file larger than `shard_bytes`.
    """
    stem = _stem(like)
    if stem.startswith("open_clip"):
        shard_bytes = math.inf  # open_clip reads no index
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > shard_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    end = f"-of-{len(shards):05}.safetensors"  # as the hub names them
    return {f"{stem}-{number:05}{end}": names for number, names in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of sharded files, from the tensors of each and the bytes of all."""
    table = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    stem = next(iter(files)).rpartition("-00001-of-")[0]
    (folder / (stem + INDEX)).write_bytes(text.encode())


def _stem(like: str) -> str:
    for ending in (INDEX, ".safetensors"):
        if like.endswith(ending):
            return like.removesuffix(ending)
    return "open_clip_model" if like.startswith("open_clip") else "model"


def _shard(index: Path, name: str) -> Path:
    """Find a file that an index names."""
    parts = PurePosixPath(name)
    suffix = ".safetensors" if index.name.endswith(INDEX) else ".bin"
    plain = not parts.is_absolute() and ".." not in parts.parts and name.isprintable()
    if not plain or "\\" in name or not name.endswith(suffix):
        raise InputError(
            f"'{index}' names the file {name!r}; expected a {suffix} file in the same folder"
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
