"""Images of unusual depth, and bytes that are no images."""

import io
import random

import datasets
import numpy as np
import pytest
from PIL import Image

from cl_merge import cli, load
from cl_merge.data.images import ImageTable, as_rgb
from cl_merge.errors import InputError

GREY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def deep(kind):
    """The grey values of 8 bits, written in 16."""
    wide = GREY.astype(np.uint16) * 257
    file = io.BytesIO()
    if kind == "big-endian":
        big = Image.frombytes("I;16B", (16, 16), wide.astype(">u2").tobytes())
        big.save(file, "TIFF")
    else:
        Image.fromarray(wide).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian"])
def test_grey_values_of_16_bits_are_scaled_not_cut_off(kind):
    opened = Image.open(io.BytesIO(deep(kind)))
    assert np.array_equal(np.asarray(as_rgb(opened))[..., 0], GREY)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    image = Image.fromarray(GREY).convert(mode)
    assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.slow
def test_streams_and_predictions_see_the_same_of_them(finished, tmp_path):
    (tmp_path / "deep.png").write_bytes(deep("PNG"))
    Image.fromarray(GREY).save(tmp_path / "flat.png")
    classifier = load(finished)
    flat, other = (classifier.prepare(tmp_path / name) for name in ("flat.png", "deep.png"))
    assert flat.equal(other)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": deep("PNG"), "path": None}], "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    assert np.array_equal(np.asarray(ImageTable(rows).image(0))[..., 0], GREY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.slow
def test_damaged_images_are_read_or_one_error(finished, tmp_path, kind):
    file = io.BytesIO()
    Image.fromarray(GREY).convert("RGB").save(file, kind)
    classifier, path = load(finished), tmp_path / "image"
    for seed in range(40):
        draw, content = random.Random(seed), bytearray(file.getvalue())
        for _ in range(draw.choice([1, 5, 50])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(1, len(content) + 1)])
        try:
            classifier.prepare(path)
        except InputError as error:
            said = str(error)
        else:
            continue
        assert said.startswith(f"'{path}' is no readable image (")
        assert "\n" not in said


def test_an_image_that_would_fill_the_memory_is_skipped_and_named(
    finished, tmp_path, monkeypatch, capsys
):
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    Image.fromarray(GREY).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert cli.main(["predict", str(finished), str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "small.png" in said.out
    assert f"skipped: '{tmp_path / 'large.png'}' is no readable image (Image size" in said.err
    assert said.err.count("\n") == 1
