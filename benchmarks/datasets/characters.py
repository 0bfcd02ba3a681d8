"""The 62 letters and digits as a data set of small pictures, drawn on the spot.

The embedded model ``glyph`` learned from characters of the same kind. What is drawn here it has not
seen: the fonts are those held out of its pre-training, a character keeps its size and its position
on the line (so that c is not C), and five looks go beyond the distortions that it learned from.

``characters.png`` holds the shapes, so that no version of a font or of its renderer changes a
picture; `cl_merge.benchmarks.studies.glyph_shapes` has made it.
"""

from __future__ import annotations

import string
import unicodedata
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Generator, Tensor

if TYPE_CHECKING:
    import datasets

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase

LOOKS = ("slanted", "textured", "negative", "noisy", "handwritten")
"""How pictures differ; a domain each for domain-incremental streams."""

SIDE = 32
"""Height and width of a picture in pixels."""

# Pictures of each class, in equal parts of each look, and the seed.
_SPLITS = (("train", 40, 20240), ("test", 15, 20241))
_FONTS = 3
_FIELD = 64  # side of a shape in pixels


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

    outlines, strokes = _distances()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[unicode_name(c) for c in CHARACTERS]),
            "look": datasets.ClassLabel(names=list(LOOKS)),
        }
    )
    splits = datasets.DatasetDict()
    for split, count, seed in _SPLITS:
        rows = _rows(outlines, strokes, count, seed)
        splits[split] = datasets.Dataset.from_dict(rows, features)
    return splits


def unicode_name(character: str) -> str:
    """Name a letter or digit, as in ``"small letter a"``."""
    return unicodedata.name(character).lower().removeprefix("latin ")


def outline_distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distances in pixels to the outline of a shape, negative inside."""
    outside, inside = distance_transform_edt(~mask), distance_transform_edt(mask)
    return np.asarray(outside - inside)


def _distances() -> tuple[Tensor, Tensor]:
    """Distances in pixels to outlines and to thinned strokes, float32 [fonts, 62, 64, 64] each."""
    with files("cl_merge.benchmarks.datasets").joinpath("characters.png").open("rb") as file:
        sheet = np.asarray(Image.open(file))
    tiles = sheet.reshape(2, _FONTS, _FIELD, len(CHARACTERS), _FIELD).transpose(0, 1, 3, 2, 4)
    filled, thinned = tiles.reshape(2, -1, _FIELD, _FIELD)
    outlines = [outline_distance(mask) for mask in filled]
    strokes = [distance_transform_edt(~stroke) for stroke in thinned]
    fields = torch.from_numpy(np.stack([*outlines, *strokes])).float().view(tiles.shape)
    return fields[0], fields[1]


def _rows(outlines: Tensor, strokes: Tensor, count: int, seed: int) -> dict[str, list[object]]:
    """Draw so many pictures of each class; they come look by look."""
    # Uniform numbers only: those of torch's generator are the same on every machine.
    random = Generator().manual_seed(seed)
    labels = torch.arange(len(CHARACTERS)).repeat(count // len(LOOKS))
    rows: dict[str, list[object]] = {"image": [], "label": [], "look": []}
    for look, name in enumerate(LOOKS):
        fields = strokes if name == "handwritten" else outlines
        pictures = _draw(fields, labels, name, random)
        levels = (255 * pictures).round().byte().permute(0, 2, 3, 1).numpy()
        rows["image"] += [Image.fromarray(picture) for picture in levels]
        rows["label"] += labels.tolist()
        rows["look"] += [look] * len(labels)
    return rows


def _draw(fields: Tensor, labels: Tensor, look: str, random: Generator) -> Tensor:
    """Draw characters with one look, each in its own way; float32 [B, 3, 32, 32], 0 to 1."""
    count = len(labels)
    distance = fields[torch.randint(len(fields), (count,), generator=random), labels]
    thickness = (1.2, 2.6) if look == "handwritten" else (-0.5, 1.0)
    radius = uniform(count, *thickness, random)
    grid = _grid(count, look, random)
    warped = F.grid_sample(
        distance[:, None], grid, padding_mode="border", align_corners=False, mode="bilinear"
    )
    fine = torch.sigmoid((column(radius) - warped) / 0.7)
    ink = F.avg_pool2d(fine, _FIELD // SIDE)
    pen, paper = _colours(count, look, random)
    if look == "textured":
        paper = (paper + 0.5 * _texture(count, random)).clamp(0, 1)
        pen = (pen + 0.2 * _texture(count, random)).clamp(0, 1)
    picture = paper + (pen - paper) * ink
    most = 0.45 if look == "noisy" else 0.06
    noise = 2 * torch.rand(picture.shape, generator=random) - 1
    return (picture + noise * column(uniform(count, 0.5 * most, most, random))).clamp(0, 1)


def _grid(count: int, look: str, random: Generator) -> Tensor:
    """Where each pixel looks: rotation, shear, size, position, and bending for a hand."""
    turn, lean = (0.6, 0.9) if look == "slanted" else (0.15, 0.2)
    angle, shear = uniform(count, -turn, turn, random), uniform(count, -lean, lean, random)
    size, shift = uniform(count, 0.85, 1.15, random), uniform(2 * count, -0.08, 0.08, random)
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
    angle, waves = uniform(count, 0, 3.1416, random), uniform(count, 2, 14, random)
    along = column(angle.cos()) * axis + column(angle.sin()) * axis[:, None]
    stripes = (column(waves) * along + column(uniform(count, 0, 6.2832, random))).sin()
    blotches = F.avg_pool2d(_smooth(count, 3, 6, random), _FIELD // SIDE)
    return (0.5 * stripes + blotches).clamp(-1, 1)


def _smooth(count: int, channels: int, cells: int, random: Generator) -> Tensor:
    """Interpolate uniform noise from a coarse grid; about -1 to 1, [B, channels, 64, 64]."""
    coarse = 2 * torch.rand(count, channels, cells, cells, generator=random) - 1
    return F.interpolate(coarse, size=(_FIELD, _FIELD), mode="bicubic", align_corners=True)


def uniform(count: int, low: float, high: float, random: Generator) -> Tensor:
    """Draw one number per picture."""
    return low + (high - low) * torch.rand(count, generator=random)


def column(values: Tensor) -> Tensor:
    """One value per picture, shaped to multiply pictures."""
    return values[:, None, None, None]
