"""The 62 letters and digits as a data set of small pictures, drawn on the spot.

The embedded model ``glyph`` learned from characters of the same kind. What is drawn here it has not
seen: the fonts are those held out of its pre-training, a character keeps its size and its place on
the line (so that c is not C), and five looks go beyond the distortions that it learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Generator, Tensor

from cl_merge.benchmarks.datasets.characters import CHARACTERS, HELD_OUT, spoken, thinned

if TYPE_CHECKING:
    import datasets

LOOKS = ("slanted", "textured", "negative", "noisy", "handwritten")
"""How pictures differ; a domain each for domain-incremental streams."""

SIDE = 32
"""Height and width of a picture in pixels."""

_TRAIN, _TEST = 40, 15  # pictures of each class, in equal parts of each look
_SEEDS = {"train": 20240, "test": 20241}

_FIELD = 64  # side of a distance field
_EM = 44  # of a font, in pixels of a field: capitals are about 30 high
_LINE = 45  # where the letters stand, in pixels of a field from the top


def characters() -> datasets.DatasetDict:
    """Draw the data set: the same pictures every time, in a few seconds, without a network.

    Returns:
        Splits ``train`` (40 pictures of each of the 62 classes) and ``test`` (15), with columns
        ``image`` (RGB, 32 x 32 pixels), ``label`` (`ClassLabel`: digits, capital letters, small
        letters; the names are their Unicode names, such as ``"small letter a"``) and ``look``
        (`ClassLabel` of `LOOKS`).

    Example:
        >>> characters()["test"].num_rows
        930
    """
    import datasets

    fields = _Fields.of(HELD_OUT)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[spoken(character)[0] for character in CHARACTERS]),
            "look": datasets.ClassLabel(names=list(LOOKS)),
        }
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(_rows(fields, count, _SEEDS[split]), features)
            for split, count in (("train", _TRAIN), ("test", _TEST))
        }
    )


@dataclass
class _Fields:
    """Distances to what is drawn, in pixels; float32 [fonts, 62, 64, 64].

    Attributes:
        outlines: To the character's outline, negative inside.
        strokes: To its thinned stroke.
    """

    outlines: Tensor
    strokes: Tensor

    @classmethod
    def of(cls, fonts: tuple[str, ...]) -> _Fields:
        masks = np.stack([[_mask(font, c) for c in CHARACTERS] for font in fonts])
        flat = masks.reshape(-1, _FIELD, _FIELD)
        thin = thinned(torch.from_numpy(flat)).numpy()
        outlines = [distance_transform_edt(~m) - distance_transform_edt(m) for m in flat]
        strokes = [distance_transform_edt(~stroke) for stroke in thin]
        both = (outlines, strokes)
        return cls(*(torch.from_numpy(np.stack(f)).float().view(masks.shape) for f in both))


def _mask(font: str, character: str) -> NDArray[np.bool_]:
    """Draw a character in its own size on the line, in the middle between left and right."""
    face = ImageFont.truetype(_font_file(font), _EM)
    canvas = Image.new("L", (_FIELD, _FIELD))
    left, _, right, _ = face.getbbox(character, anchor="ls")
    place = ((_FIELD - (left + right)) / 2, _LINE)
    ImageDraw.Draw(canvas).text(place, character, fill=255, font=face, anchor="ls")
    return np.asarray(canvas) > 127


def _rows(fields: _Fields, count: int, seed: int) -> dict[str, list[object]]:
    """Draw so many pictures of each class; they come look by look."""
    # Uniform numbers only: those of torch's generator are the same on every machine.
    random = Generator().manual_seed(seed)
    labels = torch.arange(len(CHARACTERS)).repeat(count // len(LOOKS))
    rows: dict[str, list[object]] = {"image": [], "label": [], "look": []}
    for look, name in enumerate(LOOKS):
        pictures = _draw(fields, labels, name, random)
        levels = (255 * pictures).round().byte().permute(0, 2, 3, 1).numpy()
        rows["image"] += [Image.fromarray(picture) for picture in levels]
        rows["label"] += labels.tolist()
        rows["look"] += [look] * len(labels)
    return rows


def _draw(fields: _Fields, labels: Tensor, look: str, random: Generator) -> Tensor:
    """Draw characters with one look, each in its own way; float32 [B, 3, 32, 32], 0 to 1."""
    count = len(labels)
    fonts = torch.randint(len(fields.outlines), (count,), generator=random)
    if look == "handwritten":
        distance, radius = fields.strokes[fonts, labels], _uniform(count, 1.2, 2.6, random)
    else:
        distance, radius = fields.outlines[fonts, labels], _uniform(count, -0.5, 1.0, random)
    grid = _grid(count, look, random)
    warped = F.grid_sample(
        distance[:, None], grid, padding_mode="border", align_corners=False, mode="bilinear"
    )
    fine = torch.sigmoid((_column(radius) - warped) / 0.7)
    ink = F.avg_pool2d(fine, _FIELD // SIDE)
    pen, paper = _colours(count, look, random)
    if look == "textured":
        paper = (paper + 0.5 * _texture(count, random)).clamp(0, 1)
        pen = (pen + 0.2 * _texture(count, random)).clamp(0, 1)
    picture = paper + (pen - paper) * ink
    most = 0.45 if look == "noisy" else 0.06
    noise = 2 * torch.rand(picture.shape, generator=random) - 1
    return (picture + noise * _column(_uniform(count, 0.5 * most, most, random))).clamp(0, 1)


def _grid(count: int, look: str, random: Generator) -> Tensor:
    """Where each pixel looks: rotation, shear, size, place, and bending for a hand."""
    turn, lean = (0.6, 0.9) if look == "slanted" else (0.15, 0.2)
    angle, shear = _uniform(count, -turn, turn, random), _uniform(count, -lean, lean, random)
    size, shift = _uniform(count, 0.85, 1.15, random), _uniform(2 * count, -0.08, 0.08, random)
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = [cos, shear * cos - sin, shift[:count], sin, shear * sin + cos, shift[count:]]
    affine = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, [count, 1, _FIELD, _FIELD], align_corners=False)
    for cells, bend in ((4, 0.18), (7, 0.08)) if look == "handwritten" else ((4, 0.06),):
        grid = grid + bend * _smooth(count, 2, cells, random).permute(0, 2, 3, 1)
    return grid


def _colours(count: int, look: str, random: Generator) -> tuple[Tensor, Tensor]:
    """Choose ink and paper: dark on light, or light on dark in a negative, with little contrast."""
    dark, light = (torch.rand(count, 3, 1, 1, generator=random) for _ in range(2))
    if look == "negative":
        return 0.35 + 0.3 * light, 0.05 + 0.25 * dark
    return 0.4 * dark, 0.6 + 0.4 * light


def _texture(count: int, random: Generator) -> Tensor:
    """Make stripes across blotches, -1 to 1; [B, 3, 32, 32]."""
    axis = torch.linspace(-1, 1, SIDE)
    angle, waves = _uniform(count, 0, 3.1416, random), _uniform(count, 2, 14, random)
    along = _column(angle.cos()) * axis + _column(angle.sin()) * axis[:, None]
    stripes = (_column(waves) * along + _column(_uniform(count, 0, 6.2832, random))).sin()
    blotches = F.avg_pool2d(_smooth(count, 3, 6, random), _FIELD // SIDE)
    return (0.5 * stripes + blotches).clamp(-1, 1)


def _smooth(count: int, channels: int, cells: int, random: Generator) -> Tensor:
    """Interpolate uniform noise from a coarse grid; about -1 to 1, [B, channels, 64, 64]."""
    coarse = 2 * torch.rand(count, channels, cells, cells, generator=random) - 1
    return F.interpolate(coarse, size=(_FIELD, _FIELD), mode="bicubic", align_corners=True)


def _uniform(count: int, low: float, high: float, random: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=random)


def _column(values: Tensor) -> Tensor:
    """One value per picture, shaped to multiply pictures."""
    return values[:, None, None, None]


def _font_file(name: str) -> str:
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"))
