"""What the embedded model learns from: shapes, captions, drawings."""

from importlib.resources import files
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from cl_merge.benchmarks.datasets.characters import CHARACTERS
from cl_merge.benchmarks.studies.glyph_shapes import (
    FIELD,
    FONTS,
    HELD_OUT,
    Atlas,
    captions,
    held_out_sheet,
    shapes,
    spoken,
    thinned,
)
from cl_merge.benchmarks.studies.pretrain_glyph import draw


@pytest.fixture(scope="module")
def atlas():
    return Atlas(shapes(["cmr10"]))


def missing(font: str) -> bool:
    return not Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf").exists()


@pytest.mark.parametrize("font", FONTS)
def test_every_font_has_every_character(font):
    if missing(font):
        pytest.skip(f"this matplotlib does not carry {font}")
    assert {shape.character for shape in shapes([font])} == set(CHARACTERS)


@pytest.mark.skipif(any(map(missing, HELD_OUT)), reason="this matplotlib lacks a held-out font")
def test_the_sheet_of_the_data_set_is_what_the_held_out_fonts_draw():
    with files("cl_merge.benchmarks.datasets").joinpath("characters.png").open("rb") as file:
        stored = np.asarray(Image.open(file))
    # Another renderer may round a few pixels of an outline otherwise.
    assert (stored != np.asarray(held_out_sheet())).mean() < 1e-3


def test_training_never_draws_from_the_held_out_fonts():
    assert {shape.font for shape in shapes()} == set(FONTS) - set(HELD_OUT)


def test_unicode_names_the_style_of_an_alphabet():
    styles = {shape.style for shape in shapes(["STIXGeneral"]) if shape.character == "7"}
    assert {"serif", "double-struck", "monospace", "sans-serif bold"} <= styles


def test_fields_measure_distances_to_the_ink(atlas):
    assert atlas.outlines.shape == atlas.strokes.shape == (len(atlas), FIELD, FIELD)
    assert (atlas.outlines.flatten(1).amin(1) < 0).all()
    assert (atlas.strokes.flatten(1).amin(1) == 0).all()
    # Nothing touches the border, however it will be bent.
    assert (atlas.outlines[:, 0] > 4).all()
    # A stroke runs inside its outline.
    assert (atlas.outlines[atlas.strokes == 0] < 1).all()


def test_thinning_keeps_the_topology_of_a_ring():
    axis = torch.arange(-12, 13)
    distance = (axis**2 + axis[:, None] ** 2).sqrt()
    ring = ((distance > 5) & (distance < 10))[None]
    thin = thinned(ring)
    assert (thin & ~ring).sum() == 0
    assert 30 <= thin.sum() <= 60
    assert torch.equal(thinned(thin), thin)
    # Each pixel has two neighbours: the ring is closed and one pixel wide.
    neighbours = torch.nn.functional.conv2d(
        thin[:, None].float(), torch.ones(1, 1, 3, 3), padding=1
    )[:, 0]
    assert (neighbours[thin] >= 3).all()


def test_captions_tell_all_characters_apart():
    names = [name for character in CHARACTERS for name in spoken(character)]
    assert len(set(names)) == len(names)
    assert {len(captions("7", style)) for style in ("serif", "bold italic")} == {40}
    assert captions("A", "serif")[0] == "a photo of the capital letter a"


def test_a_seed_fixes_every_pixel(atlas):
    fields, pens = atlas.strokes[:16], torch.full((16,), 3.0)
    first, same, other = (draw(fields, pens, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (16, 3, 32, 32)
    assert first.amin() >= 0
    assert first.amax() <= 1
    # There is something to see on each of them.
    assert (first.flatten(1).std(dim=1) > 0.02).all()
