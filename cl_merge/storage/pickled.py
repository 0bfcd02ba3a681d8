"""Checkpoints of `torch.save`: only their tensors and plain values are read, never code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from cl_merge.errors import InputError
from cl_merge.storage.choosing import choose_tensors, plain_names
from cl_merge.storage.layouts import in_shard
from cl_merge.storage.safetensors_format import not_whole
from cl_merge.storage.unpickling import read_without_code
from cl_merge.storage.weights import StoredTensor, Weights

_LIGHTNING = "pytorch-lightning_version"


def torch_weights(path: Path, key: str = "") -> Weights:
    """Open a checkpoint that `torch.save` wrote: a state dict, alone or in one of a training.

    The tensors are mapped from the file; those of files older than PyTorch 1.6 are in memory.

    Args:
        path: The file.
        key: Under which key of the file the weights are; empty to find out.

    Returns:
        The opened checkpoint.

    Raises:
        InputError: If the file is damaged, or it is not clear which of its tensors are the weights.
    """
    content = _load(path)
    lightning = isinstance(content, Mapping) and _LIGHTNING in content
    tensors = _chosen(path, content, key)
    return _weights(path, "Lightning checkpoint" if lightning else "torch checkpoint", tensors)


def sharded_torch_weights(index: Path, shards: Mapping[Path, Sequence[str]]) -> Weights:
    """Open checkpoints of `torch.save` that an index joins, from the names of each file's tensors.

    Raises:
        InputError: If a file is damaged, or does not hold what the index says.
    """
    joined: dict[str, Tensor] = {}
    for path, names in shards.items():
        joined |= in_shard(path, index, names, _chosen(path, _load(path)))
    return _weights(index, "sharded torch checkpoint", joined)


def _weights(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> Weights:
    tensors = dict(plain_names(path, tensors))
    stored = {
        name: StoredTensor(tensor.dtype, tensor.shape, partial(_read, tensors, name))
        for name, tensor in tensors.items()
    }
    return Weights(path, kind, stored)


def _chosen(path: Path, content: Any, key: str = "") -> dict[str, Tensor]:
    try:
        tensors = choose_tensors(path, content, key)
    except RecursionError as error:
        raise _unreadable(path, error) from error
    # Addresses in a map are in the order of the file.
    return dict(sorted(tensors.items(), key=lambda item: item[1].data_ptr()))


def _read(tensors: dict[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    tensor = tensors[name]
    if not tensor.is_contiguous():  # a transposed matrix, say: copied once
        tensor = tensors[name] = tensor.contiguous()
    stretch = tensor.reshape(-1)[start:stop]
    # One element counts as contiguous whatever its stride.
    if stretch.data_ptr() % stretch.element_size() or stretch.stride(0) != 1:
        return stretch.clone(memory_format=torch.contiguous_format)
    return stretch


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        if not is_zip:  # before PyTorch 1.6; such files cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
        _refuse_torchscript(path)
        with suppress(pickle.UnpicklingError):  # it knows few of the instructions
            # Not found out by trying: what was read until then would be checked at the next load.
            if not get_unsafe_globals_in_checkpoint(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return read_without_code(path)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(path, error) from error


def _refuse_torchscript(path: Path) -> None:
    """Refuse programs early: torch would warn before it did."""
    with zipfile.ZipFile(path) as archive:
        if any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist()):
            raise InputError(
                f"'{path}' is a TorchScript program, which is not loaded because that runs code; "
                "load it with torch.jit.load where you trust it, and save its state_dict()"
            )


def _unreadable(path: Path, error: Exception) -> InputError:
    text = str(error)
    code = re.search(r"GLOBAL (\S+)", text)
    if code:
        return InputError(
            f"'{path}' holds Python objects ({code.group(1)}), which are not loaded because that "
            "runs code; save only tensors and plain values, as torch.save(model.state_dict(), path)"
        )
    if "mmap" in text and "allocate" in text:
        return InputError(
            f"'{path}' is larger than this machine's memory and cannot be mapped; convert it to "
            "safetensors"
        )
    # What the reader of archives says is of use; what the reader of pickles says is not.
    plain = isinstance(error, (RuntimeError, zipfile.BadZipFile)) and text
    reason = text.splitlines()[0][:200] if plain else "its pickle is damaged"
    return not_whole(path, reason, "checkpoint of torch.save")
