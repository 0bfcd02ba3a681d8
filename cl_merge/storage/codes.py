"""Groups of values as small multiples of a scale: how few bits hold a parameter."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.errors import InputError


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
# not pay; with fewer, twice as many shares lower the error by about 1 %. Of 2 bits, four levels
# without a zero, -1.5 to 1.5, make less error in the vectors but more in what MagMax merges,
# and lose the zeros; the levels -1, 0 and 1 are far behind in all.
SCHEMES = {
    "int8": Scheme(8, 128, -127, 127, (1.0,)),
    "int4": Scheme(4, 64, -7, 8, (1.0, 0.9, 0.8, 0.7, 0.6)),
    "int2": Scheme(2, 32, -1, 2, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)),
}


def encode(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Write whole groups, float32 [groups * values of a group], all of them finite.

    All operations are element by element, or a maximum: their results are the same on every device
    and for every cut.

    Returns:
        The packed codes, uint8 [groups * bytes of a group], and the scales, bfloat16 [groups].
    """
    values = values.view(-1, scheme.group)
    scales = _scales(values, scheme)
    multiples = values / _without_zeros(scales)[:, None]
    codes = multiples.round_().clamp_(scheme.low, scheme.high).to(torch.int8).view(torch.uint8)
    return _pack(codes.view(-1), scheme.bits), scales.to(torch.bfloat16)


def decode(codes: Tensor, scales: Tensor, scheme: Scheme, out: Tensor) -> None:
    """Read what `encode` wrote into `out`, contiguous float32 [groups * values of a group]."""
    multiples = _multiples(codes, scheme).view(-1, scheme.group)
    torch.mul(multiples, scales.to(torch.float32)[:, None], out=out.view(-1, scheme.group))


def _scales(values: Tensor, scheme: Scheme) -> Tensor:
    """Choose the scale of each group: float32 [groups] that are exact in bfloat16."""
    lowest, highest = values.amin(dim=1), values.amax(dim=1)  # `aminmax` takes ten times as long
    peak = torch.where(highest >= -lowest, highest, lowest)
    if not bool(peak.isfinite().all()):
        raise not_finite()
    if scheme.low == -scheme.high:
        peak = peak.abs()
    # By a number, a GPU would multiply with its reciprocal, which rounds otherwise.
    unit = peak / torch.full_like(peak, scheme.high)
    clips = unit.new_tensor(scheme.clips)
    scales = _in_bfloat16(clips[:, None] * unit, scheme)  # [clips, groups]
    if len(clips) == 1:
        return scales[0]
    # Errors are measured in units: squares of very small values would be zero. The groups are
    # columns, which is faster, and the large temporaries are made once.
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
    limit = _largest_scale(scheme.high)
    scale = scale.to(torch.bfloat16).to(torch.float32).clamp_(-limit, limit)
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(scale.abs() < tiny, 0.0, scale)


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
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


@functools.cache
def _largest_scale(high: int) -> float:
    """The largest bfloat16 of which this multiple is finite."""
    largest = torch.tensor(torch.finfo(torch.float32).max / high)
    return (largest.view(torch.int32) & -(1 << 16)).view(torch.float32).item()


def _sum(rows: Tensor) -> Tensor:
    """Sum rows, a power of two in number, in place and in an order that is the same everywhere."""
    half = len(rows)
    while half > 1:
        half //= 2
        rows[:half] += rows[half : 2 * half]
    return rows[0]


def _without_zeros(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def not_finite() -> InputError:
    """Make the error for values that no code can stand for."""
    return InputError("NaN or infinity, which cannot be quantised; store it as float32")
