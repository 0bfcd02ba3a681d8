"""Quantised task vectors: few bits per value, for streams whose task vectors fill the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.errors import InputError, unknown_name
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.parallel import in_threads
from cl_merge.storage.codes import SCHEMES, Scheme, decode, encode, not_finite

STORES: tuple[str, ...] = ("float32", "bf16", "int8", "int4", "int2")
"""How the values of a task vector can be stored, from the most bits to the fewest."""


# Elements per piece: with all temporaries it fits a core's cache; other devices want few launches.
_CPU_PIECE = 1 << 16
_DEVICE_PIECE = 1 << 24

_SMALL = 4096  # parameters of fewer values stay floating point; a part of the file format


@dataclass(frozen=True)
class Quantized:
    """A parameter in few bits.

    Attributes:
        store: One of `STORES`.
        shape: Shape of the parameter.
        codes: The packed codes of whole groups, the last one filled up, uint8 [groups * bytes of a
            group]; the first of neighbours lies in the lowest bits of a byte. Without scales the
            values themselves, bfloat16 or float32 [n].
        scales: The scale of each group, bfloat16 [groups]; None where `codes` are values.
    """

    store: str
    shape: torch.Size
    codes: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


def quantize(tensor: Tensor, store: str, *, piece: int | None = None) -> Quantized:
    """Write a parameter in few bits.

    ========= ==================== ====================== ==============
    store     multiples of a scale values that share one  bits per value
    ========= ==================== ====================== ==============
    float32   -                    -                      32
    bf16      -                    -                      16
    int8      -127 to 127          128                    8.125
    int4      -7 to 8              64                     4.25
    int2      -1, 0, 1, 2          32                     2.5
    ========= ==================== ====================== ==============

    Every group of neighbours in the flattened parameter has a bfloat16 scale: of the range of
    float32, and short enough that its multiples are exact. Its sign, with int4 and int2, is that of
    the value of largest magnitude, for which the one multiple more is then there: what mergers
    live from is written best, zeros stay zeros, and no code is wasted. The magnitude of the scale
    is, of a few, the one of least squared error. The result depends neither on the device nor on
    the number of threads, and writing what was read gives the same result again.

    Parameters of less than 4096 values or less than two dimensions, such as biases and norms, are
    bfloat16 in all stores of fewer bits: they hardly count in size, and much in the model.

    Args:
        tensor: Floating point, any shape, dtype and device; rounded to float32 first.
        store: One of `STORES`.
        piece: How many values are worked on at a time; None for what suits the device.

    Returns:
        The parameter, on the tensor's device.

    Raises:
        InputError: If the store is unknown, or the tensor is not floating point or, unless the
            store is float32, not finite in float32.

    Example:
        >>> quantized = quantize(torch.linspace(-1, 1, 4096).view(64, 64), "int4")
        >>> quantized.nbytes * 8 / 4096
        4.25
        >>> dequantize(quantized).shape
        torch.Size([64, 64])

    Reference:
        Task vectors in few bits: Kim et al., Task Vector Quantization for Memory-Efficient Model
        Merging, ICCV 2025. Clipping for least squared error: Banner et al., Post training 4-bit
        quantization of convolutional networks for rapid-deployment, NeurIPS 2019.
    """
    check_store(store)
    if not tensor.is_floating_point():
        raise InputError(f"only floating-point tensors can be quantised, not {tensor.dtype}")
    flat = tensor.detach().reshape(-1)
    if store == "float32":
        return Quantized(store, tensor.shape, flat.to(torch.float32, copy=True), None)
    if store == "bf16" or is_small(tensor.shape):
        return Quantized(store, tensor.shape, _to_bfloat16(flat, piece), None)
    scheme = SCHEMES[store]
    groups = -(-flat.numel() // scheme.group)
    codes = flat.new_empty(groups * scheme.group_bytes, dtype=torch.uint8)
    scales = flat.new_empty(groups, dtype=torch.bfloat16)

    def encode_part(first: int) -> None:
        last = min(first + step, groups)
        values = flat[first * scheme.group : last * scheme.group].to(torch.float32)
        missing = (last - first) * scheme.group - values.numel()
        values = torch.nn.functional.pad(values, (0, missing)) if missing else values
        codes_here, scales[first:last] = encode(values, scheme)
        codes[first * scheme.group_bytes : last * scheme.group_bytes] = codes_here

    step = _piece(tensor.device, piece) // scheme.group
    in_threads(encode_part, range(0, groups, step))
    return Quantized(store, tensor.shape, codes, scales)


def dequantize(quantized: Quantized) -> Tensor:
    """Read a quantised parameter.

    Args:
        quantized: What `quantize` returned.

    Returns:
        The values, float32 in the original shape, on the same device. Zeros that were zero may be
        negative zeros.
    """
    if quantized.scales is None:
        return quantized.codes.to(torch.float32, copy=True).view(quantized.shape)
    values = decode_groups(quantized.codes, quantized.scales, SCHEMES[quantized.store])
    return values[: quantized.shape.numel()].view(quantized.shape)


def stored(vector: Mapping[str, Tensor], store: str) -> dict[str, Tensor]:
    """Tell what comes back after a task vector was saved and loaded, without a file.

    Args:
        vector: Floating-point tensors of any shape, dtype and device, by parameter name.
        store: One of `STORES`.

    Returns:
        The tensors, float32 on the same devices; with the store float32 those that were given.

    Raises:
        InputError: As `quantize` does; names the tensor.

    Example:
        >>> stored({"bias": torch.tensor([1.0, 1.001])}, "bf16")
        {'bias': tensor([1., 1.])}
    """
    check_store(store)
    if store == "float32":
        return dict(vector)
    return {
        name: dequantize(quantize_named(name, tensor, store)) for name, tensor in vector.items()
    }


def check_store(store: object) -> str:
    """Make sure that a store is one of `STORES`, and return it."""
    if isinstance(store, str) and store in STORES:
        return store
    raise unknown_name("store", store, STORES)


def quantize_named(name: str, tensor: Tensor, store: str) -> Quantized:
    """Do as `quantize` does, with the parameter's name in the error."""
    try:
        return quantize(tensor, store)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def is_small(shape: torch.Size) -> bool:
    """Tell whether a parameter of this shape stays floating point in every store."""
    return len(shape) < 2 or shape.numel() < _SMALL


def decode_groups(codes: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Read whole groups, as `decode` does, a piece at a time on several threads."""
    values = torch.empty(len(scales) * scheme.group, dtype=torch.float32, device=codes.device)

    def decode_part(first: int) -> None:
        last = min(first + step, len(scales))
        part = codes[first * scheme.group_bytes : last * scheme.group_bytes]
        decode(part, scales[first:last], scheme, values[first * scheme.group : last * scheme.group])

    step = _piece(codes.device) // scheme.group
    in_threads(decode_part, range(0, len(scales), step))
    return values


def _to_bfloat16(flat: Tensor, piece: int | None) -> Tensor:
    result = torch.empty_like(flat, dtype=torch.bfloat16)
    limit = torch.finfo(torch.bfloat16).max  # the largest of float32 would round to infinity
    step = _piece(flat.device, piece)

    def convert(start: int) -> None:
        part = flat[start : start + step].to(torch.float32)
        if not is_finite(part):
            raise not_finite()
        result[start : start + step] = part.clamp(-limit, limit)

    in_threads(convert, range(0, flat.numel(), step))
    return result


def _piece(device: torch.device, piece: int | None = None) -> int:
    return piece or (_CPU_PIECE if device.type == "cpu" else _DEVICE_PIECE)
