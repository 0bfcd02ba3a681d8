"""The model of the paper, loaded by open_clip from a hub that is laid out as the real one."""

import time
from types import SimpleNamespace

import pytest
import torch
from fake_hub import FakeHub, set_offline, use_hub
from hub_repositories import MODEL, model_repository, tiny_model
from safetensors.torch import load

from cl_merge.errors import InputError
from cl_merge.models.pretrained import load_clip, model_download

NAME = "ViT-B-16-quickgelu:openai"
FILE = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def repository():
    return model_repository()


@pytest.fixture
def hub(tmp_path, monkeypatch, repository):
    made = FakeHub()
    made.add(repository)
    tiny_model(monkeypatch)
    with made.serving():
        use_hub(monkeypatch, made.endpoint, tmp_path / "cache")
        yield made


def test_the_model_is_downloaded_once_and_then_read_from_the_cache(hub, repository, monkeypatch):
    assert model_download(NAME) == len(repository.files[FILE])
    clip = load_clip(NAME)
    weights = load(repository.files[FILE])
    for name, value in clip.model.state_dict().items():
        torch.testing.assert_close(value, weights[name])
    assert model_download(NAME) == 0
    hub.sent.clear()
    set_offline(monkeypatch)
    load_clip(NAME)
    assert not hub.sent


def test_a_connection_that_breaks_leaves_no_half_weights(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut[FILE] = 1000
    hub.broken.add(FILE)
    with pytest.raises(InputError, match=f"cannot download the weights of '{NAME}'"):
        load_clip(NAME)
    hub.broken.clear()
    assert load_clip(NAME).image_size == 32


def test_without_a_network_the_hub_is_asked_once(hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    began = time.monotonic()
    message = f"cannot download the weights of '{NAME}': '{MODEL}': the hub cannot be reached. With"
    with pytest.raises(InputError, match=f"^{message}"):
        load_clip(NAME)
    assert time.monotonic() - began < 2


def test_a_disk_without_room_is_named_before_the_download(hub, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(InputError, match=f"^model '{NAME}' needs .* MB at .*, where 1.0 MB are"):
        load_clip(NAME)
    assert FILE not in hub.sent


def test_what_the_hub_does_not_have_is_said(hub):
    del hub.repositories["models", MODEL]
    with pytest.raises(InputError, match=f"^'{MODEL}': the hub has nothing of this name"):
        model_download(NAME)
    hub.add(model_repository())
    del hub.repositories["models", MODEL].files[FILE]
    message = f"^'{MODEL}' on the hub has none of {FILE}, open_clip_pytorch_model.bin"
    with pytest.raises(InputError, match=message):
        model_download(NAME)


@pytest.mark.parametrize("name", ["glyph", "lite"])
def test_models_of_packages_need_no_download(name):
    assert model_download(name) == 0
