"""Files of quantised task vectors: written whole, and read in any stretches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.storage.files import save_tensors
from cl_merge.storage.quantize import SCHEMES, STORES, decode_groups, is_small, quantize_named
from cl_merge.storage.safetensors_weights import SafetensorsFile, SafetensorsWeights
from cl_merge.storage.weights import QUANTIZED_VERSION, TASK_VECTOR, Weights

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
    """Write a task vector in few bits, atomically; the same content gives the same bytes.

    Raises:
        InputError: If a value is not finite in float32; names the tensor. Nothing is written then.
        StorageError: If the file cannot be written.
    """
    shapes = {name: list(tensor.shape) for name, tensor in sorted(vector.items())}
    tensors = {}
    for name in shapes:
        quantized = quantize_named(name, vector[name], store)
        if quantized.scales is None:
            tensors[_VALUES + name] = quantized.codes.cpu()
        else:
            tensors[_CODES + name] = quantized.codes.cpu()
            tensors[_SCALES + name] = quantized.scales.cpu()
    ours = {
        TASK_VECTOR: QUANTIZED_VERSION,
        STORE: store,
        _SHAPES: json.dumps(shapes, separators=(",", ":")),
    }
    save_tensors(path, tensors, {**metadata, **ours})


def load_quantized(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole quantised task vector: its values in float32, and its metadata."""
    raw = SafetensorsWeights(path, [SafetensorsFile(path)], "task vector")
    with QuantizedWeights(path, raw) as weights:
        tensors = {name: weights.read(name).view(weights.shape(name)) for name in weights.names}
        return tensors, weights.metadata


class QuantizedWeights(Weights):
    """The values of a quantised task vector, decoded stretch by stretch.

    `names` are sorted, and the metadata are what the vector was saved with, and the store.

    Args:
        path: What errors call the file.
        weights: The raw tensors and metadata of the file.

    Raises:
        InputError: If the file is damaged; names the file and the tensor. The scales are read for
            this, the codes are not.
    """

    def __init__(self, path: str | Path, weights: Weights) -> None:
        self.path = Path(path)
        self.kind = "task vector"
        self.is_task_vector = True
        self._weights = weights
        self.metadata = dict(weights.metadata)
        self.metadata.pop(TASK_VECTOR, None)
        store = _read_store(path, self.metadata.get(STORE))
        self._scheme = SCHEMES.get(store)
        self._shapes = _read_shapes(path, self.metadata.pop(_SHAPES, None))
        self.names = list(self._shapes)
        self._check(store)

    @override
    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    @override
    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    @override
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Decode a stretch of a parameter into a new float32 tensor."""
        start, stop, _ = slice(start, stop).indices(self._shapes[name].numel())
        stop = max(start, stop)
        scheme = None if is_small(self._shapes[name]) else self._scheme
        if scheme is None:
            return self._weights.read(_VALUES + name, start, stop).to(torch.float32)
        first, last = start // scheme.group, -(-stop // scheme.group)
        size = scheme.group_bytes
        codes = self._weights.read(_CODES + name, first * size, last * size)
        values = decode_groups(codes, self._weights.read(_SCALES + name, first, last), scheme)
        return values[start - first * scheme.group : stop - first * scheme.group]

    @override
    def close(self) -> None:
        self._weights.close()

    def _check(self, store: str) -> None:
        """Make sure that the file holds what the shapes ask for, and that the scales are sound."""
        there = set(self._weights.names)
        for name, shape in self._shapes.items():
            for key, dtype, size in _layout(name, shape, store):
                if key not in there:
                    raise _damaged(self.path, f"'{key}' is missing")
                there.remove(key)
                found = f"{self._weights.dtype(key)} {tuple(self._weights.shape(key))}"
                if found != f"{dtype} {(size,)}":
                    raise _damaged(self.path, f"'{key}' is {found} instead of {dtype} {(size,)}")
                if self._scheme is not None and key.startswith(_SCALES):
                    scales = self._weights.read(key).to(torch.float32)
                    if not bool((scales * self._scheme.high).isfinite().all()):
                        raise _damaged(self.path, f"'{key}' holds NaN or values that are too large")
        if there:
            raise _damaged(self.path, f"'{min(there)}' belongs to no parameter")


def _layout(name: str, shape: torch.Size, store: str) -> Iterator[tuple[str, torch.dtype, int]]:
    """Tell which tensors of the file a parameter becomes: name, dtype and length."""
    scheme = SCHEMES.get(store)
    if scheme is None or is_small(shape):
        yield _VALUES + name, torch.bfloat16, shape.numel()
        return
    groups = -(-shape.numel() // scheme.group)
    yield _CODES + name, torch.uint8, groups * scheme.group_bytes
    yield _SCALES + name, torch.bfloat16, groups


def _read_store(path: str | Path, store: str | None) -> str:
    if store is None:
        raise _damaged(path, f"its metadata lack '{STORE}'")
    if store not in STORES[1:]:
        raise InputError(
            f"'{path}' stores its values as '{store}', which this cl_merge does not know; update "
            "cl_merge"
        )
    return store


def _read_shapes(path: str | Path, text: str | None) -> dict[str, torch.Size]:
    try:
        shapes = json.loads(text or "")
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
