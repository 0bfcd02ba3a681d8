"""The characters that the embedded model ``glyph`` learns from: shapes from fonts, and captions.

The fonts are those that matplotlib carries (DejaVu, STIX, Computer Modern; ``cmti10`` since 3.11).
A shape is kept as two distance fields, that of its outline and that of its thinned stroke:
thickness is then a threshold that costs nothing to vary. The held-out fonts make up the data set
``characters``; its shapes are drawn anew with::

    python -m cl_merge.benchmarks.studies.glyph_shapes characters.png
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from cl_merge.benchmarks.datasets.characters import CHARACTERS, outline_distance, unicode_name

FIELD = 64
"""Side of a distance field in pixels."""

INK = 44
"""The longer side of a character's ink in a field: the margin leaves room for any distortion."""

FONTS = {
    "DejaVuSans": "sans-serif",
    "DejaVuSans-Bold": "bold sans-serif",
    "DejaVuSans-Oblique": "oblique sans-serif",
    "DejaVuSans-BoldOblique": "bold oblique sans-serif",
    "DejaVuSansMono": "monospace",
    "DejaVuSansMono-Bold": "bold monospace",
    "DejaVuSansMono-Oblique": "oblique monospace",
    "DejaVuSansMono-BoldOblique": "bold oblique monospace",
    "DejaVuSerif": "serif",
    "DejaVuSerif-Bold": "bold serif",
    "DejaVuSerif-Italic": "italic serif",
    "DejaVuSerif-BoldItalic": "bold italic serif",
    "STIXGeneral": "serif",
    "STIXGeneralBol": "bold serif",
    "STIXGeneralItalic": "italic serif",
    "STIXGeneralBolIta": "bold italic serif",
    "cmr10": "serif",
    "cmb10": "bold serif",
    "cmss10": "sans-serif",
    "cmti10": "italic",
    "cmtt10": "typewriter",
    "cmmi10": "old-style italic",
}
"""matplotlib's fonts with Latin letters and digits, each with the words for its style."""

HELD_OUT = ("DejaVuSansMono-Oblique", "STIXGeneralBol", "cmti10")
"""Fonts that training never draws from, for a figure on characters of unseen shape."""

# Unicode also encodes whole alphabets of another style, and their names say which. Only STIX draws
# them by hand; DejaVu mostly repeats its other fonts there.
_ALPHABET = re.compile(
    r"(?:MATHEMATICAL |(?=DOUBLE-STRUCK|SCRIPT|BLACK-LETTER))(.+) (?:CAPITAL|SMALL|DIGIT) \w+"
)


@dataclass(frozen=True)
class Shape:
    """One ASCII character in one style, drawn by itself or by a styled variant of it."""

    character: str
    code: int
    font: str
    style: str


def shapes(fonts: Sequence[str] | None = None) -> list[Shape]:
    """List every shape that fonts have for the characters; by default not those held out."""
    if fonts is None:
        fonts = [font for font in FONTS if font not in HELD_OUT]
    found = []
    for font in fonts:
        for code in sorted(FT2Font(str(_file(font))).get_charmap()):
            plain = unicodedata.normalize("NFKC", chr(code))
            if len(plain) != 1 or plain not in CHARACTERS:
                continue
            if code < 128:
                found.append(Shape(plain, code, font, FONTS[font]))
            elif font.startswith("STIX") and (
                match := _ALPHABET.fullmatch(unicodedata.name(chr(code)))
            ):
                found.append(Shape(plain, code, font, match[1].lower()))
    return found


def _file(font: str) -> Path:
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")


class Atlas:
    """Distance fields of shapes, ready to be drawn in batches."""

    def __init__(self, listed: Sequence[Shape]) -> None:
        self.shapes = list(listed)
        self.classes = torch.tensor([CHARACTERS.index(shape.character) for shape in self.shapes])

    def __len__(self) -> int:
        return len(self.shapes)

    @cached_property
    def outlines(self) -> Tensor:
        """Signed distance to the outline in pixels, positive outside; float32 [shapes, 64, 64]."""
        masks = [_mask(shape, 2 * FIELD) for shape in self.shapes]
        # Drawn at twice the size, so a distance there is half a pixel here.
        fields = torch.from_numpy(np.stack([outline_distance(mask) for mask in masks])).float()
        return F.avg_pool2d(fields, 2) / 2

    @cached_property
    def strokes(self) -> Tensor:
        """Distance to the thinned stroke in pixels; float32 [shapes, 64, 64]."""
        thin = thinned(torch.from_numpy(np.stack([_mask(s, FIELD) for s in self.shapes])))
        fields = [distance_transform_edt(~stroke) for stroke in thin.numpy()]
        return torch.from_numpy(np.stack(fields).astype(np.float32))


def _mask(shape: Shape, side: int) -> NDArray[np.bool_]:
    """Draw a shape as large as the margin allows, centred by its ink."""
    font = ImageFont.truetype(_file(shape.font), 4 * side)
    left, top, right, bottom = font.getbbox(chr(shape.code))
    ink = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), chr(shape.code), fill=255, font=font)
    scale = side * INK / FIELD / max(ink.size)
    width, height = (max(1, round(length * scale)) for length in ink.size)
    ink = ink.resize((width, height), Image.Resampling.BOX)
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas) > 127


def thinned(masks: Tensor) -> Tensor:
    """Thin shapes, bool [N, height, width], to strokes one pixel wide that keep their topology.

    Example:
        >>> bar = torch.zeros(1, 7, 9, dtype=torch.bool)
        >>> bar[:, 2:5, 1:8] = True
        >>> thinned(bar)[0].sum(dim=1).tolist()
        [0, 0, 0, 4, 0, 0, 0]

    Reference: Zhang and Suen, A Fast Parallel Algorithm for Thinning Digital Patterns,
    Communications of the ACM, 1984.
    """
    masks = masks.clone()
    before = -1
    while before != (before := int(masks.sum())):
        for erasable in _ERASABLE:
            ring = F.conv2d(masks[:, None].float(), _BITS, padding=1)
            masks &= ~erasable[ring[:, 0].long()]
    return masks


# The eight neighbours as the bits of a byte, clockwise from the north.
_BITS = torch.tensor([[[[128.0, 1.0, 2.0], [64.0, 0.0, 4.0], [32.0, 16.0, 8.0]]]])


def _erasable() -> tuple[Tensor, Tensor]:
    """Tabulate, for each of the 256 rings, whether either half step takes the pixel in it away."""
    ring = torch.arange(256)[:, None] >> torch.arange(8) & 1
    count = ring.sum(dim=1)
    crossings = ((1 - ring) & ring.roll(-1, dims=1)).sum(dim=1)
    north, east, south, west = ring[:, ::2].unbind(dim=1)
    border = (count >= 2) & (count <= 6) & (crossings == 1)
    first, second = east & south & (north | west), north & west & (east | south)
    return border & (first == 0), border & (second == 0)


_ERASABLE = _erasable()


def spoken(character: str) -> list[str]:
    """Name a character in several ways, with a letter's case, since the tokenizer drops it.

    Example:
        >>> spoken("7")
        ['digit seven', 'number seven', 'number 7', 'digit 7', 'seven']
        >>> spoken("a")
        ['small letter a', 'lowercase letter a', 'lowercase a']
    """
    name = unicode_name(character)
    if character.isdigit():
        word = name.removeprefix("digit ")
        return [name, f"number {word}", f"number {character}", f"digit {character}", word]
    case = "uppercase" if character.isupper() else "lowercase"
    letter = character.lower()
    return [name, f"{case} letter {letter}", f"{case} {letter}"]


CAPTIONS = (
    "a photo of the {name}",
    "a photo of a {style} {name}",
    "an image of the {name}, {style}",
    "the {name}",
    "a {style} {name}",
    "the {name}, {style}",
    "{name}",
    "{style} {name}",
)


def captions(character: str, style: str) -> list[str]:
    """Describe a character of a style in several ways, as many for every style."""
    return [
        caption.format(name=name, style=style) for name in spoken(character) for caption in CAPTIONS
    ]


def held_out_sheet() -> Image.Image:
    """The sheet of the data set ``characters``: a row a font, and the same rows thinned."""
    masks = np.stack([[_mask_on_the_line(font, c) for c in CHARACTERS] for font in HELD_OUT])
    thin = thinned(torch.from_numpy(masks.reshape(-1, FIELD, FIELD))).numpy()
    tiles = np.concatenate([masks, thin.reshape(masks.shape)])
    return Image.fromarray(tiles.transpose(0, 2, 1, 3).reshape(len(tiles) * FIELD, -1))


def _mask_on_the_line(font: str, character: str) -> NDArray[np.bool_]:
    """Draw a character in its own size on the line, in the middle between left and right."""
    # Capitals are about 30 pixels high, and stand 45 from the top.
    face = ImageFont.truetype(_file(font), 44)
    canvas = Image.new("L", (FIELD, FIELD))
    left, _, right, _ = face.getbbox(character, anchor="ls")
    corner = ((FIELD - (left + right)) / 2, 45)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=face, anchor="ls")
    return np.asarray(canvas) > 127


if __name__ == "__main__":
    held_out_sheet().save(sys.argv[1], optimize=True)
