"""Files of quantised task vectors: written whole, and read in any stretches."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cl_merge.errors import InputError
from cl_merge.storage.files import save_tensors
from cl_merge.storage.quantize import (
    SCHEMES,
    STORES,
    Scheme,
    decode_groups,
    is_small,
    quantize_named,
)
from cl_merge.storage.safetensors_format import SafetensorsFile, safetensors_weights
from cl_merge.storage.weights import QUANTIZED_VERSION, TASK_VECTOR, StoredTensor, Weights

STORE = "cl_merge.store"
"""Metadata key of the store."""

_SHAPES = "cl_merge.shapes"  # metadata key of the parameters' shapes, as JSON
_MOST_DIMENSIONS = 64  # of a tensor, in torch

# Every tensor of the file has one of these before the parameter's name, so that no two names can
# become one, whatever the parameters are called.
_CODES, _SCALES, _VALUES = "codes/", "scales/", "values/"


def save_quantized(
    path: str | Path, vector: Mapping[str, Tensor], metadata: Mapping[str, str], store: str
) -> None:
    """Write a task vector in few bits, atomically; the same content gives the same bytes."""
    shapes = {name: list(tensor.shape) for name, tensor in sorted(vector.items())}
    tensors = {}
    for name in shapes:
        quantized = quantize_named(name, vector[name], store)
        tensors[(_VALUES if quantized.scales is None else _CODES) + name] = quantized.codes.cpu()
        if quantized.scales is not None:
            tensors[_SCALES + name] = quantized.scales.cpu()
    text = json.dumps(shapes, separators=(",", ":"))
    ours = {TASK_VECTOR: QUANTIZED_VERSION, STORE: store, _SHAPES: text}
    save_tensors(path, tensors, {**metadata, **ours})


def load_quantized(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole quantised task vector: its values in float32, and its metadata."""
    raw = safetensors_weights(path, [SafetensorsFile(path)], "task vector")
    with quantized_weights(raw) as weights:
        tensors = {name: weights.read(name).view(weights.shape(name)) for name in weights.names}
        return tensors, weights.metadata


def quantized_weights(raw: Weights) -> Weights:
    """Show the values of a quantised task vector, float32, decoded stretch by stretch.

    Its metadata are what the vector was saved with, and the store. A damaged file is an error that
    names the tensor; the scales are read for this, the codes are not.
    """
    metadata = {key: text for key, text in raw.metadata.items() if key != TASK_VECTOR}
    store = metadata.get(STORE)
    if store is None:
        raise _damaged(raw.path, f"its metadata lack '{STORE}'")
    if store not in STORES[1:]:
        raise InputError(
            f"'{raw.path}' stores its values as '{store}', which this cl_merge does not know; "
            "update cl_merge"
        )
    scheme = SCHEMES.get(store)
    shapes = _read_shapes(raw.path, metadata.pop(_SHAPES, ""))
    left = set(raw.names)
    tensors = {name: _parameter(raw, left, name, shape, scheme) for name, shape in shapes.items()}
    if left:
        raise _damaged(raw.path, f"'{min(left)}' belongs to no parameter")
    return Weights(raw.path, "task vector", tensors, metadata)


def _parameter(
    raw: Weights, left: set[str], name: str, shape: torch.Size, scheme: Scheme | None
) -> StoredTensor:
    """Take the sound tensors of a parameter from those that are left in the file."""
    if scheme is None or is_small(shape):
        _take(raw, left, _VALUES + name, torch.bfloat16, shape.numel())
        values = partial(raw.read, _VALUES + name)
        return StoredTensor(torch.float32, shape, lambda *part: values(*part).to(torch.float32))
    groups = -(-shape.numel() // scheme.group)
    _take(raw, left, _CODES + name, torch.uint8, groups * scheme.group_bytes)
    _take(raw, left, _SCALES + name, torch.bfloat16, groups)
    scales = raw.read(_SCALES + name).to(torch.float32)
    if not bool((scales * scheme.high).isfinite().all()):
        raise _damaged(raw.path, f"'{_SCALES + name}' holds NaN or values that are too large")
    return StoredTensor(torch.float32, shape, partial(_read_groups, raw, name, scheme))


def _read_groups(raw: Weights, name: str, scheme: Scheme, start: int, stop: int) -> Tensor:
    first, last = start // scheme.group, -(-stop // scheme.group)
    codes = raw.read(_CODES + name, first * scheme.group_bytes, last * scheme.group_bytes)
    values = decode_groups(codes, raw.read(_SCALES + name, first, last), scheme)
    return values[start - first * scheme.group : stop - first * scheme.group]


def _take(raw: Weights, left: set[str], key: str, dtype: torch.dtype, size: int) -> None:
    if key not in left:
        raise _damaged(raw.path, f"'{key}' is missing")
    left.remove(key)
    found, wanted = f"{raw.dtype(key)} {tuple(raw.shape(key))}", f"{dtype} {(size,)}"
    if found != wanted:
        raise _damaged(raw.path, f"'{key}' is {found} instead of {wanted}")


def _read_shapes(path: str | Path, text: str) -> dict[str, torch.Size]:
    try:
        shapes = json.loads(text)
        sound = isinstance(shapes, dict) and all(map(_is_shape, shapes.values()))
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise _damaged(path, f"its metadata lack the shapes of the parameters, '{_SHAPES}'")
    return {name: torch.Size(shape) for name, shape in sorted(shapes.items())}


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(size or 1 for size in shape) < 1 << 60  # more bytes torch could not count
    )


def _damaged(path: str | Path, what: str) -> InputError:
    return InputError(
        f"'{path}' is no whole quantised task vector: {what}; write or download it again"
    )
