"""Quantised task vectors: few bits per value, for streams whose task vectors fill the disk."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.errors import InputError, unknown_name
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.parallel import in_threads

STORES: tuple[str, ...] = ("float32", "bf16", "int8", "int4", "int2")
"""How the values of a task vector can be stored, from the most bits to the fewest."""

# Elements per piece: with all temporaries it fits a core's cache; other devices want few launches.
_CPU_PIECE = 1 << 16
_DEVICE_PIECE = 1 << 24

_SMALL = 4096  # parameters of fewer values stay floating point; a part of the file format


@dataclass(frozen=True)
class Scheme:
    """How a store writes a group of neighbours: a multiple of one scale for each value."""

    bits: int  # of a code
    group: int  # values that share a scale; a power of two
    low: int  # the lowest multiple
    high: int  # the highest multiple
    # Shares of the group's largest magnitude that the highest multiple may stand for. The first
    # must be 1, which gives a group that was quantised before its own scale again.
    clips: tuple[float, ...]

    @property
    def group_bytes(self) -> int:
        """Bytes that the codes of a group take."""
        return self.group * self.bits // 8


# A part of the file format, but for the shares. Measured on task vectors: with 8 bits clipping does
# not pay; with fewer, twice as many shares lower the error by about 1 %. Of 2 bits, levels without
# a zero, -1.5 to 1.5, make more error in what MagMax merges; -1, 0 and 1 are far behind.
SCHEMES = {
    "int8": Scheme(8, 128, -127, 127, (1.0,)),
    "int4": Scheme(4, 64, -7, 8, (1.0, 0.9, 0.8, 0.7, 0.6)),
    "int2": Scheme(2, 32, -1, 2, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)),
}


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

    Every group of neighbours in the flattened parameter has a bfloat16 scale, whose multiples are
    exact in float32. Its sign, with int4 and int2, is that of the value of largest magnitude, for
    which the one multiple more is then there: what mergers live from is written best. Its magnitude
    is, of a few, the one of least squared error. Zeros stay zeros. The result depends neither on
    the device nor on the number of threads, and writing what was read gives the same result again.

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
        values = flat.to(torch.float32)
        if not is_finite(values):
            raise _not_finite()
        limit = torch.finfo(torch.bfloat16).max  # the largest of float32 would round to infinity
        values = values.clamp(-limit, limit).to(torch.bfloat16)
        return Quantized(store, tensor.shape, values, None)
    scheme = SCHEMES[store]
    step = (piece or _piece(tensor.device)) // scheme.group * scheme.group
    starts = range(0, flat.numel(), step)
    parts = in_threads(lambda first: _encode(flat[first : first + step], scheme), starts)
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
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
    """Read what `_encode` wrote, float32 [n], a piece at a time on several threads."""
    values = torch.empty(len(scales), scheme.group, dtype=torch.float32, device=codes.device)
    codes = codes.view(len(scales), scheme.group_bytes)
    step = _piece(codes.device) // scheme.group

    def decode_part(first: int) -> None:
        part = slice(first, first + step)
        multiples = _multiples(codes[part].view(-1), scheme).view(-1, scheme.group)
        torch.mul(multiples, scales[part].to(torch.float32)[:, None], out=values[part])

    in_threads(decode_part, range(0, len(scales), step))
    return values.view(-1)


def _piece(device: torch.device) -> int:
    return _CPU_PIECE if device.type == "cpu" else _DEVICE_PIECE


def _encode(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Write values [n] as packed codes and the scales of their groups.

    All operations are element by element, or a maximum: their results are the same on every device
    and for every cut.
    """
    values = torch.nn.functional.pad(values.to(torch.float32), (0, -len(values) % scheme.group))
    values = values.view(-1, scheme.group)
    scales = _scales(values, scheme)
    multiples = values / _without_zeros(scales)[:, None]
    codes = multiples.round_().clamp_(scheme.low, scheme.high).to(torch.int8).view(torch.uint8)
    return _pack(codes.view(-1), scheme.bits), scales.to(torch.bfloat16)


def _scales(values: Tensor, scheme: Scheme) -> Tensor:
    """Choose the scale of each group: float32 [groups] that are exact in bfloat16."""
    lowest, highest = values.amin(dim=1), values.amax(dim=1)  # `aminmax` takes ten times as long
    peak = torch.where(highest >= -lowest, highest, lowest)
    if not bool(peak.isfinite().all()):
        raise _not_finite()
    if scheme.low == -scheme.high:
        peak = peak.abs()
    # By a number, a GPU would multiply with its reciprocal, which rounds otherwise.
    unit = peak / torch.full_like(peak, scheme.high)
    clips = unit.new_tensor(scheme.clips)
    scales = _in_bfloat16(clips[:, None] * unit, scheme)  # [clips, groups]
    if len(clips) == 1:
        return scales[0]
    # In units, as squares of very small values would be zero. The groups are columns, which is
    # faster, and the large temporaries are made once.
    unit = _without_zeros(unit)
    ratios = scales / unit
    in_units = (values / unit[:, None]).t().contiguous()
    multiples, difference = torch.empty_like(in_units), torch.empty_like(in_units)
    best, least = scales[0], torch.full_like(unit, torch.inf)
    factors, squares = _without_zeros(ratios).reciprocal(), ratios.square()
    squares.masked_fill_(ratios == 0, torch.inf)  # a scale that is zero is the last choice
    for scale, factor, square in zip(scales, factors, squares, strict=True):
        torch.mul(in_units, factor, out=multiples)
        torch.round(multiples, out=difference)
        difference.clamp_(scheme.low, scheme.high).sub_(multiples).square_()
        error = _sum(difference) * square
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    return best


def _in_bfloat16(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round scales to bfloat16, so that no multiple overflows and none is less than normal."""
    limits = torch.finfo(torch.float32)
    largest = torch.tensor(limits.max / scheme.high).view(torch.int32) & -(1 << 16)  # in bfloat16
    limit = largest.view(torch.float32).item()
    scale = scale.to(torch.bfloat16).to(torch.float32).clamp_(-limit, limit)
    return torch.where(scale.abs() < limits.tiny, 0.0, scale)


def _pack(codes: Tensor, bits: int) -> Tensor:
    each = codes.bitwise_and_((1 << bits) - 1).view(-1, 8 // bits)
    packed = each[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= each[:, place] << (bits * place)
    return packed


def _multiples(codes: Tensor, scheme: Scheme) -> Tensor:
    """Unpack codes to float32; a table that gives all values of a byte at once is the fastest."""
    if scheme.bits == 8:
        return codes.view(torch.int8).to(torch.float32)
    found = _table(scheme, codes.device).index_select(0, codes.to(torch.int32))
    return (torch.view_as_real(found) if found.is_complex() else found).view(torch.float32).view(-1)


@functools.cache
def _table(scheme: Scheme, device: torch.device) -> Tensor:
    """What each byte stands for: 256 entries of as many bytes as its values take as float32."""
    with torch.inference_mode(False):
        bytes_ = torch.arange(256).view(-1, 1)
        code = (bytes_ >> torch.arange(0, 8, scheme.bits)) & ((1 << scheme.bits) - 1)
        multiples = torch.where(code > scheme.high, code - (1 << scheme.bits), code).float()
        entry = torch.int64 if scheme.bits == 4 else torch.complex128  # never looked at as numbers
        return multiples.view(entry).view(-1).to(device)


def _sum(rows: Tensor) -> Tensor:
    """Sum rows, a power of two in number, in place and in an order that is the same everywhere."""
    half = len(rows)
    while half > 1:
        half //= 2
        rows[:half] += rows[half : 2 * half]
    return rows[0]


def _without_zeros(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def _not_finite() -> InputError:
    return InputError("NaN or infinity, which cannot be quantised; store it as float32")
