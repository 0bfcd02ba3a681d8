"""Checkpoints of `torch.save`: only their tensors and plain values are read, never code."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_merge.errors import InputError
from cl_merge.storage.weights import StoredTensor, Weights

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

_LIGHTNING = "pytorch-lightning_version"
_STATES = ("state_dict", "model", "model_state_dict")  # where training checkpoints keep the weights
_WRAPPER = "module."  # what DistributedDataParallel puts before every name


def torch_weights(path: Path) -> Weights:
    """Open a checkpoint that `torch.save` wrote: a state dict, alone or in one of a training.

    The tensors are mapped from the file; those of files older than PyTorch 1.6 are in memory.
    """
    content = _load(path)
    lightning = isinstance(content, Mapping) and _LIGHTNING in content
    tensors = _tensors(path, _state(path, content))
    if all(name.startswith(_WRAPPER) for name in tensors):
        tensors = {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}
    stored = {
        name: StoredTensor(tensor.dtype, tensor.shape, partial(_read, tensors, name))
        # Addresses in a map are in the order of the file.
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr())
    }
    return Weights(path, "Lightning checkpoint" if lightning else "torch checkpoint", stored)


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
        if is_zip:
            _refuse_torchscript(path)
        # Files before PyTorch 1.6 are no archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
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
    return InputError(
        f"'{path}' is not a whole checkpoint of torch.save ({reason}); it is corrupt, cut short or "
        "of another format: write or download it again"
    )


def _state(path: Path, content: Any) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise InputError(
            f"'{path}' holds a {type(content).__name__}; expected a state dict, as saved by "
            "torch.save(model.state_dict(), path)"
        )
    for key in _STATES:
        if isinstance(content.get(key), Mapping):
            inner: Mapping[Any, Any] = content[key]
            return inner
    return content


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Check that a state dict holds nothing but plain tensors."""
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"'{path}': {name!r} is a {type(value).__name__}; expected a state dict, tensors "
                f"by name, alone or under one of {', '.join(_STATES)}"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise InputError(
                f"'{path}': '{name}' is a sparse, quantised or empty tensor; expected plain "
                "values: convert it with to_dense() or dequantize()"
            )
        tensors[name] = value.detach()
    return tensors
