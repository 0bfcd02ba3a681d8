"""The embedded model: what was shipped, and what it can do before any task."""

from importlib.resources import files
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch import nn

from cl_merge import load_clip
from cl_merge.benchmarks.studies.pretrain_glyph import digits_accuracy

FOLDER = Path(str(files("cl_merge.models.glyph")))


@pytest.fixture(scope="module")
def clip():
    return load_clip("glyph")


def test_open_clip_loads_the_folder_by_itself():
    name = f"local-dir:{FOLDER}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(["a photo of the digit seven"])
    assert tokens.shape == (1, 16)
    assert model.encode_text(tokens).shape == (1, 128)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert list(transform.transforms[-1].mean) == [0.5, 0.5, 0.5]


def test_weights_are_small_finite_and_half_precision():
    file = FOLDER / "open_clip_model.safetensors"
    assert file.stat().st_size <= 16_000_000
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dict
            tensor = tensors.get_tensor(name)
            assert tensor.dtype == torch.float16, name
            assert tensor.isfinite().all(), name


def test_the_image_tower_has_no_state_but_its_parameters(clip):
    assert not [
        m for m in clip.model.visual.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    assert not list(clip.model.visual.buffers())


def test_features_of_an_image_do_not_depend_on_its_batch(clip):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = clip.model.visual
    with torch.no_grad():
        torch.testing.assert_close(tower(images)[1:2], tower(images[1:2]))


@pytest.mark.slow
def test_it_reads_digits_that_it_never_saw():
    assert digits_accuracy(FOLDER) >= 75
