"""Draw characters as a hand, a printer or a bad camera would, a whole batch at a time.

The input are distance fields: a character's outline is where its field is zero, a pen that follows
its stroke draws wherever the field is below the pen's radius. Every number drawn comes from one
generator, so that a seed fixes every pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SIDE = 32
"""Side of the drawn images in pixels."""

# Characters are drawn finer than needed: what a low resolution does to them comes afterwards.
_FINE = 48


def draw(fields: Tensor, thickness: Tensor, random: Generator) -> Tensor:
    """Draw characters, each distorted in its own way: float32 [B, 3, 32, 32] from 0 to 1.

    Bent, sheared, scaled and moved; drawn with an uneven pen; sometimes with a gap; seen at a low
    resolution; in random colours, dark on light or light on dark, with noise. The fields are
    float32 [B, 64, 64]; up to the thickness, float32 [B], there is ink; both in pixels of a field.
    """
    ink = _inked(fields, thickness, random)
    ink = _with_gaps(ink, random)
    ink = _at_low_resolution(ink, random)
    return _coloured(ink, random)


def _inked(fields: Tensor, thickness: Tensor, random: Generator) -> Tensor:
    """Bend the characters and follow them with a pen of uneven width; [B, 1, fine, fine]."""
    count = len(fields)
    distance = F.grid_sample(
        fields[:, None], _bent_grid(count, random), padding_mode="border", align_corners=False
    )
    uneven = _smooth_noise(count, 1, 4, random)
    radius = _column(thickness) * (1 + 0.25 * uneven)
    softness = _column(_uniform(count, 0.6, 1.6, random))
    return torch.sigmoid((radius - distance) / softness)


def _bent_grid(count: int, random: Generator) -> Tensor:
    """Where each pixel looks: rotation, shear, scale, shift, and two scales of smooth bending."""
    angle, shear = _uniform(count, -0.26, 0.26, random), _uniform(count, -0.45, 0.45, random)
    # The grid of a smaller character reaches further.
    wide, high = (1 / _uniform(count, low, 1.15, random) for low in (0.6, 0.8))
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * wide, (shear * cos - sin) * wide], dim=1)
    second = torch.stack([sin * high, (shear * sin + cos) * high], dim=1)
    shift = torch.stack([_uniform(count, -m, m, random) for m in (0.1, 0.08)], dim=1)
    affine = torch.cat([torch.stack([first, second], dim=1), shift[:, :, None]], dim=2)
    grid = F.affine_grid(affine, [count, 1, _FINE, _FINE], align_corners=False)
    for cells, most in ((3, 0.16), (5, 0.10)):
        amount = _column(_uniform(count, 0, most, random))
        grid = grid + (amount * _smooth_noise(count, 2, cells, random)).permute(0, 2, 3, 1)
    return grid


def _with_gaps(ink: Tensor, random: Generator) -> Tensor:
    """Rub a spot out of every third character: hands leave loops open that printers close."""
    count = len(ink)
    x, y = (_column(_uniform(count, -0.6, 0.6, random)) for _ in range(2))
    radius = _uniform(count, 0.05, 0.22, random) * (torch.rand(count, generator=random) < 0.3)
    axis = torch.linspace(-1, 1, _FINE)
    distance = ((axis - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
    kept = torch.sigmoid((distance - _column(radius)) * 20)
    return ink * torch.where(_column(radius) > 0, kept, 1.0)


def _at_low_resolution(ink: Tensor, random: Generator) -> Tensor:
    """Average over coarse pixels and blow them up again; [B, 1, 32, 32].

    Scans of single characters are often that small. The resolution differs by eighths of the
    batch, since one call resizes to one size.
    """
    parts = []
    for part in ink.chunk(8):
        low, smooth = torch.rand(2, generator=random).tolist()
        side = int(torch.randint(9, 21, (1,), generator=random)) if low < 0.75 else SIDE
        mode = "bicubic" if smooth < 0.7 else "bilinear"
        coarse = F.adaptive_avg_pool2d(part, side)
        parts.append(F.interpolate(coarse, size=(SIDE, SIDE), mode=mode, align_corners=False))
    return torch.cat(parts).clamp(0, 1)


def _coloured(ink: Tensor, random: Generator) -> Tensor:
    """Choose ink and paper, dark and light either way round and half of them grey; add noise."""
    count = len(ink)
    grey = _column(torch.rand(count, generator=random) < 0.5)
    colours = torch.rand(2, count, 3, 1, 1, generator=random)
    colours = torch.where(grey, colours.mean(dim=2, keepdim=True), colours)
    darker = 0.35 * colours[0] * _column(torch.rand(count, generator=random))
    lighter = 1 - 0.35 * colours[1] * _column(torch.rand(count, generator=random))
    dark_ink = _column(torch.rand(count, generator=random) < 0.5)
    pen, paper = (
        torch.where(dark_ink, darker, lighter),
        torch.where(dark_ink, lighter, darker),
    )
    strength = _column(_uniform(count, 0.6, 1.0, random))
    image = paper + (pen - paper) * ink * strength
    noise = torch.randn(image.shape, generator=random)
    return (image + noise * _column(_uniform(count, 0, 0.08, random))).clamp(0, 1)


def _smooth_noise(count: int, channels: int, cells: int, random: Generator) -> Tensor:
    """Normal noise on a coarse grid, interpolated; [B, channels, fine, fine]."""
    coarse = torch.randn(count, channels, cells, cells, generator=random)
    return F.interpolate(coarse, size=(_FINE, _FINE), mode="bicubic", align_corners=True)


def _uniform(count: int, low: float, high: float, random: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=random)


def _column(values: Tensor) -> Tensor:
    """One value per image, shaped to multiply images."""
    return values[:, None, None, None]
