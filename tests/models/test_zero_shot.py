"""The zero-shot head against a naive float64 reference, and what it refuses."""

import copy
from types import SimpleNamespace

import open_clip
import pytest
import torch

from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead, zero_shot_head

NAMES = ["cat", "sea horse", "dog", "zebra", "ant"]
TEMPLATES = ["a photo of a {}.", "the {}", "{}, drawn by hand in a {{curly}} frame"]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG, init_logit_scale=3.0).eval()
    return SimpleNamespace(model=model, tokenizer=open_clip.SimpleTokenizer(context_length=16))


def reference_rows(clip, names, templates):
    """Row by row, prompt by prompt, in float64: the formula as it is written down."""
    model = copy.deepcopy(clip.model).double()
    rows = []
    for name in names:
        units = []
        for template in templates:
            text = model.encode_text(clip.tokenizer([template.replace("{}", name)]))[0]
            units.append(text / text.square().sum().sqrt())
        mean = sum(units) / len(units)
        rows.append(mean / mean.square().sum().sqrt() * model.logit_scale.exp())
    return torch.stack(rows).detach()


@pytest.mark.parametrize("batch_size", [1, 4, 256])
@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1], TEMPLATES[1]])
def test_rows_match_the_naive_reference(clip, templates, batch_size):
    head = zero_shot_head(clip, NAMES, templates, batch_size=batch_size)
    expected = reference_rows(clip, NAMES, [templates] if isinstance(templates, str) else templates)
    assert head.weight.dtype == torch.float32
    assert head.class_names == tuple(NAMES)
    torch.testing.assert_close(head.weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_logits_are_scaled_cosines(clip):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    features = 7 * torch.randn(6, 16)
    unit = features.double() / features.double().square().sum(1, keepdim=True).sqrt()
    expected = unit @ reference_rows(clip, NAMES, TEMPLATES).T
    torch.testing.assert_close(head(features).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [[3, 0], (4,), torch.tensor([1, 2, 4]), range(5)])
def test_classes_select_rows_in_their_order(clip, classes):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    features = torch.randn(4, 16)
    torch.testing.assert_close(head(features, classes), head(features)[:, list(classes)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_are_float32_whatever_the_features_and_under_autocast(clip, dtype):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    features = torch.randn(4, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(features.float()))


def test_nothing_trains_but_gradients_reach_the_features(clip):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    features = torch.randn(4, 16, requires_grad=True)
    head(features).sum().backward()
    assert list(head.parameters()) == []
    assert not head.weight.requires_grad
    assert features.grad.abs().sum() > 0


def test_state_dict_round_trip(clip):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    other = ZeroShotHead(torch.zeros(5, 16), NAMES)
    other.load_state_dict(head.state_dict())
    assert list(head.state_dict()) == ["weight"]
    assert torch.equal(other.weight, head.weight)


def test_the_head_copies_its_weight():
    weight = torch.eye(2)
    head = ZeroShotHead(weight, ["a", "b"])
    weight.zero_()
    assert torch.equal(head.weight, torch.eye(2))


def test_a_model_in_training_mode_is_put_in_evaluation_mode(clip):
    expected = zero_shot_head(clip, NAMES, TEMPLATES).weight
    clip.model.train()
    assert torch.equal(zero_shot_head(clip, NAMES, TEMPLATES).weight, expected)
    assert not clip.model.training


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no class names: a zero-shot head needs at least one"),
        (["a", " "], "class name 1 is ' '; expected a non-empty string"),
        (["a", 7], "class name 1 is 7; expected a non-empty string"),
        (["a", "b", "a", "c", "b"], "class names must differ, but these repeat: 'a', 'b'"),
        ("cat", "class names must be a list of strings, not the string 'cat'"),
    ],
)
def test_wrong_class_names_are_named(clip, names, message):
    with pytest.raises(InputError) as error:
        zero_shot_head(clip, names, TEMPLATES)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "no templates: a zero-shot head needs one, such as 'a photo of a {}.'"),
        (
            ["a {}", "a photo"],
            "template 'a photo' must hold '{}' exactly once, where the class name goes",
        ),
        ("{} {}", "template '{} {}' must hold '{}' exactly once, where the class name goes"),
        ([3], "template 3 must hold '{}' exactly once, where the class name goes"),
    ],
)
def test_wrong_templates_are_named(clip, templates, message):
    with pytest.raises(InputError) as error:
        zero_shot_head(clip, NAMES, templates)
    assert str(error.value) == message


def test_a_batch_size_below_one_is_refused(clip):
    with pytest.raises(InputError, match=r"^batch_size=0; expected 1 or more$"):
        zero_shot_head(clip, NAMES, TEMPLATES, batch_size=0)


def test_a_weight_with_another_number_of_rows_is_refused():
    with pytest.raises(InputError) as error:
        ZeroShotHead(torch.eye(3), ["a", "b"])
    expected = "a head of 2 classes needs a weight of shape [2, features], not [3, 3]"
    assert str(error.value) == expected
