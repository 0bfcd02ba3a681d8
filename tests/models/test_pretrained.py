"""`load_clip`: where models come from, which activation they get, and every way to fail."""

import json
import logging
import pickle
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file, save_file

from cl_merge.errors import InputError
from cl_merge.models.pretrained import Source, load_clip, resolve

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
KNOWN = (
    "Known: glyph, lite, local-dir:FOLDER, ARCHITECTURE:TAG and ARCHITECTURE:FILE with an "
    "architecture of open_clip.list_models()"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as open_clip writes it, with a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("model")
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    return folder / "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The same architecture, known to open_clip by name."""
    file = tmp_path_factory.mktemp("config") / "tiny-for-tests.json"
    file.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(file)
    return file.stem


@pytest.fixture
def tag(monkeypatch, tiny, weights):
    """Give that architecture a tag, `openai`, whose weights need no download."""
    config = {"file": str(weights), "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny, {"openai": config})
    return config


def message_of(model, **options):
    with pytest.raises(InputError) as error:
        load_clip(model, **options)
    return str(error.value)


def activations(clip):
    kinds = [QuickGELU, torch.nn.GELU]
    return {kind for kind in kinds for module in clip.model.modules() if type(module) is kind}


def assert_has_weights(clip, file):
    state = clip.model.state_dict()
    for name, tensor in load_file(file).items():
        assert torch.equal(state[name], tensor), name


# What a name stands for


def test_openai_weights_get_quick_gelu_for_every_architecture_that_has_them():
    architectures = [name for name, tag in open_clip.list_pretrained() if tag == "openai"]
    assert "ViT-B-16" in architectures
    for architecture in architectures:
        assert resolve(f"{architecture}:openai") == Source(architecture, "openai", True)


def test_other_tags_get_the_activation_they_were_trained_with():
    assert resolve("ViT-B-16:laion2b_s34b_b88k") == Source("ViT-B-16", "laion2b_s34b_b88k", False)
    assert resolve("ViT-B-16:metaclip_400m") == Source("ViT-B-16", "metaclip_400m", True)


def test_openais_own_spelling_and_the_hub_are_understood():
    assert resolve("ViT-B/16:openai") == Source("ViT-B-16", "openai", True)
    assert resolve("hf-hub:owner/name") == Source("hf-hub:owner/name")


# What is loaded


def test_folder(folder, weights):
    clip = load_clip(f"local-dir:{folder}")
    assert_has_weights(clip, weights)
    assert (clip.name, clip.image_size) == (f"local-dir:{folder}", 32)
    assert not clip.model.training
    assert clip.tokenizer(["a", "b c"]).shape == (2, 16)
    grey = Image.new("L", (50, 40), 255)
    for transform in (clip.train_transform, clip.test_transform):
        torch.testing.assert_close(transform(grey), torch.full((3, 32, 32), 2.0))


def test_the_image_tower_stands_on_its_own(folder):
    clip = load_clip(f"local-dir:{folder}")
    images = torch.randn(2, 3, 32, 32)
    expected = clip.model.encode_image(images)
    visual = clip.model.visual
    del clip
    assert torch.equal(visual(images), expected)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
@pytest.mark.parametrize("ending", ["pt", "ckpt"])
def test_file_of_torch(tiny, weights, tmp_path, ending, wrap):
    file = tmp_path / f"weights.{ending}"
    torch.save(wrap(load_file(weights)), file)
    assert_has_weights(load_clip(f"{tiny}:{file}"), weights)


def test_half_precision_on_disk_is_float32_in_memory(tiny, weights, tmp_path):
    file = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, file)
    clip = load_clip(f"{tiny}:{file}")
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.float32}


def test_tag_sets_activation_and_preprocessing_without_a_warning(tiny, tag, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = load_clip(f"{tiny}:openai")
    assert_has_weights(clip, weights)
    assert activations(clip) == {QuickGELU}
    assert clip.model.visual.image_mean == tag["mean"]


@pytest.mark.parametrize(
    ("name", "activation"), [("ViT-OpenAI.pt", QuickGELU), ("laion.pt", torch.nn.GELU)]
)
def test_file_gets_quick_gelu_by_its_name_and_says_so(
    tiny, weights, tmp_path, caplog, name, activation
):
    torch.save(load_file(weights), tmp_path / name)
    with caplog.at_level(logging.INFO, logger="cl_merge.models.pretrained"):
        clip = load_clip(f"{tiny}:{tmp_path / name}")
    assert activations(clip) == {activation}
    assert caplog.messages == [f"loaded {clip.name} with {activation.__name__}"]


def test_image_size_interpolates_positions(folder):
    clip = load_clip(f"local-dir:{folder}", image_size=64)
    assert clip.image_size == 64
    image = clip.test_transform(Image.new("RGB", (100, 90)))
    assert clip.model.visual(image[None]).shape == (1, 16)
    assert clip.model.visual.positional_embedding.shape == (1 + 8 * 8, 32)


def test_glyph_is_embedded():
    clip = load_clip()
    image = clip.test_transform(Image.new("RGB", (32, 32)))
    features = clip.model.visual(image[None])
    assert clip.name == "glyph"
    assert features.isfinite().all()
    assert clip.model.encode_text(clip.tokenizer(["zero"])).shape == features.shape


@pytest.mark.slow
def test_vit_b_16_of_real_size(tmp_path):
    file = tmp_path / "vit.safetensors"
    state = open_clip.create_model("ViT-B-16").half().state_dict()
    state["logit_scale"] = torch.tensor(4.5)
    save_file(state, file)
    clip = load_clip(f"ViT-B-16:{file}")
    assert sum(parameter.numel() for parameter in clip.model.visual.parameters()) == 86_192_640
    assert torch.equal(clip.model.visual.proj, state["visual.proj"].float())
    assert clip.model.logit_scale.item() == 4.5
    image = clip.test_transform(Image.new("RGB", (300, 200)))
    assert clip.model.visual(image[None]).shape == (1, 512)
    file.unlink()


# What is refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("glyf", f"unknown model 'glyf'; did you mean 'glyph'? {KNOWN}"),
        ("ViT-B16:openai", f"unknown model 'ViT-B16'; did you mean 'ViT-B-16'? {KNOWN}"),
        ("", f"unknown model ''. {KNOWN}"),
        (
            "RN101:opneai",
            "unknown tag of RN101 'opneai'; did you mean 'openai'? Known: openai, yfcc15m",
        ),
        (
            "ViT-B-16",
            "model 'ViT-B-16' names no weights; give a tag, as in 'ViT-B-16:openai', or a file, "
            "as in 'ViT-B-16:/folder/weights.safetensors'",
        ),
        ("RN101:/no/weights.pt", "weights file '/no/weights.pt' of RN101 does not exist"),
        ("RN101:weights.pt", "weights file 'weights.pt' of RN101 does not exist"),
        ("local-dir:/no/folder", "model folder '/no/folder' does not exist"),
    ],
)
def test_unknown_names(model, message):
    assert message_of(model) == message


def test_folder_without_config(tmp_path):
    expected = f"model folder '{tmp_path}' has no open_clip_config.json"
    assert message_of(f"local-dir:{tmp_path}") == expected


def test_folder_without_weights_never_gives_a_random_model(folder, tmp_path):
    config = (folder / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    assert message_of(f"local-dir:{tmp_path}") == (
        f"model folder '{tmp_path}' has no weights; expected open_clip_model.safetensors"
    )


def test_folder_with_a_broken_config(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{")
    (tmp_path / "open_clip_model.safetensors").touch()
    message = message_of(f"local-dir:{tmp_path}")
    assert message.startswith(f"cannot read the config of 'local-dir:{tmp_path}': Expecting")


def test_folder_in_the_place_of_a_file(tiny, folder):
    expected = f"'{folder}' is a folder; load a folder as 'local-dir:{folder}'"
    assert message_of(f"{tiny}:{folder}") == expected


class Bomb:
    """Creates a file when it is unpickled: what loading weights must never do."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def truncated(weights, file):
    file.write_bytes(weights.read_bytes()[:100_000])


def truncated_archive(weights, file):
    torch.save(load_file(weights), file)
    file.write_bytes(file.read_bytes()[:100_000])


def rubbish(weights, file):
    file.write_bytes(b"not weights")


def code(weights, file):
    file.write_bytes(pickle.dumps({"weight": Bomb(file.with_suffix(".touched"))}, protocol=2))


def torch_script(weights, file):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), file)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("w.safetensors", truncated),
        ("w.safetensors", rubbish),
        ("w.safetensors", lambda weights, file: file.touch()),
        ("w.pt", truncated_archive),
        ("w.pt", rubbish),
        ("w.pt", code),
        ("w.pt", torch_script),
        ("w.ckpt", lambda weights, file: file.touch()),
    ],
)
def test_broken_file_is_named_and_its_code_never_run(tiny, weights, tmp_path, name, spoil):
    file = tmp_path / name
    spoil(weights, file)
    assert message_of(f"{tiny}:{file}") == (
        f"weights file '{file}' is corrupt or no checkpoint; expected .safetensors, or tensors "
        "saved by torch.save (pickled code and TorchScript are not loaded, for safety)"
    )
    assert not file.with_suffix(".touched").exists()


def test_broken_file_in_a_folder_is_named(folder, weights, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    truncated(weights, tmp_path / "open_clip_model.safetensors")
    message = message_of(f"local-dir:{tmp_path}")
    assert message.startswith(f"weights file '{tmp_path}/open_clip_model.safetensors' is corrupt")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_architecture_are_refused(tiny, weights, tmp_path, change):
    state = load_file(weights)
    if change == "missing":
        del state["ln_final.bias"]
    elif change == "extra":
        state["stranger"] = torch.ones(1)
    else:
        state["ln_final.bias"] = torch.ones(7)
    save_file(state, tmp_path / "other.safetensors")
    name = f"{tiny}:{tmp_path / 'other.safetensors'}"
    message = message_of(name)
    assert message.startswith(f"cannot make model '{name}' from its weights: Error(s) in loading")
    assert ("stranger" if change == "extra" else "ln_final.bias") in message
    assert "\n" not in message


def test_unreachable_hub_names_the_model_and_the_way_without(monkeypatch, tiny, tag):
    def unreachable(config):
        raise OSError("no route\nto host.")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    assert message_of(f"{tiny}:openai") == (
        f"cannot download the weights of '{tiny}:openai': no route to host. Without a connection, "
        f"fetch the file elsewhere and load it as '{tiny}:/folder/FILE'"
    )


@pytest.mark.parametrize("size", [0, -32])
def test_image_size_below_one(size):
    assert message_of("glyph", image_size=size) == (
        f"image_size={size}; expected 1 or more, in pixels"
    )


def test_image_size_below_a_patch(folder):
    message = message_of(f"local-dir:{folder}", image_size=3)
    assert message.startswith(
        f"cannot make model 'local-dir:{folder}' from its weights at image_size 3: "
    )
