"""What lies beside the weights of a folder comes along, stays behind by name, or is refused."""

import json
import logging
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from cl_merge.errors import InputError
from cl_merge.storage import open_weights

ONE = {"a": torch.ones(2)}


def model(folder, *others, weights="model.safetensors"):
    """A folder with weights, and other files with their names in them."""
    folder.mkdir(exist_ok=True, parents=True)
    (save_file if weights.endswith(".safetensors") else torch.save)(ONE, folder / weights)
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def written(tmp_path, write, caplog):
    """Write a folder like another one; gives the names of its files, and what is said to stay."""
    caplog.set_level(logging.INFO, "cl_merge")

    def write_like(base):
        with open_weights(base) as like:
            out = write(tmp_path / "out", ONE, like=like)
        said = [text for text in caplog.messages if "left behind" in text]
        assert len(said) <= 1
        found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        for name in found:
            if name != "model.safetensors":
                assert (out / name).read_bytes() == (base / name).read_bytes()
        return found, re.sub(r".* left behind ", "", said[0]) if said else ""

    return write_like


def test_small_files_come_along_and_others_are_named(tmp_path, written):
    along = ["config.json", "merges.txt", "spiece.model", "chat_template.jinja", "LICENSE"]
    along += ["source.spm", "vocab.bpe", "README.md", "modeling_x.py", "special.tokens", "pic.png"]
    behind = ["pytorch_model.bin", "optimizer.pt", "flax_model.msgpack", "tf_model.h5"]
    behind += ["model.onnx", "pytorch_model.bin.index.json", "ggml.gguf", "training_args.bin"]
    base = model(tmp_path / "base", *along, *behind, ".hidden.json", ".git/config", ".cache/x.json")
    (tmp_path / "secret.txt").write_text("secret")
    (base / "link.txt").symlink_to(tmp_path / "secret.txt")
    (base / "same.txt").symlink_to("merges.txt")
    (base / "loop.txt").symlink_to("loop.txt")
    (base / "folder.json").mkdir()
    os.mkfifo(base / "pipe.json")
    with (base / "large.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    found, said = written(base)
    assert found == sorted([*along, "same.txt", "model.safetensors"])
    assert said == ", ".join(sorted([*behind, "link.txt", "large.json"]))
    assert not (tmp_path / "out/same.txt").is_symlink()


def test_nothing_is_said_where_nothing_stays(tmp_path, written):
    base = model(tmp_path / "base", "config.json", ".gitattributes")
    assert written(base) == (["config.json", "model.safetensors"], "")


def test_small_files_of_subfolders_come_along(tmp_path, written):
    along = ["1_Pooling/config.json", "modules.json", "additional_chat_templates/tool.jinja"]
    along += ["code/blocks/attention.py", "tokenizer/vocab.txt"]
    base = model(tmp_path / "base", *along, "code/.git/config", "code/__pycache__/x.pyc")
    found, said = written(base)
    assert found == sorted([*along, "model.safetensors"])
    assert said == "code/__pycache__/"


def test_a_linked_subfolder_stays_behind(tmp_path, written):
    base = model(tmp_path / "base", "1_Pooling/config.json")
    (base / "code").symlink_to(model(tmp_path / "elsewhere", "secret.py"))
    (base / "1_Pooling/secret.py").symlink_to(tmp_path / "elsewhere/secret.py")
    found, said = written(base)
    assert found == ["1_Pooling/config.json", "model.safetensors"]
    assert said == "1_Pooling/secret.py, code/"


def test_a_snapshot_in_the_cache_of_the_hub_has_its_files(tmp_path, written):
    home = tmp_path / "models--me--mine"
    base = model(home / "snapshots/abc", "modeling_x.py", "1_Pooling/config.json")
    (home / "blobs").mkdir()
    for number, file in enumerate(path for path in sorted(base.rglob("*")) if path.is_file()):
        file.rename(home / "blobs" / str(number))
        file.symlink_to(home / "blobs" / str(number))
    found, said = written(base)
    assert found == ["1_Pooling/config.json", "model.safetensors", "modeling_x.py"]
    assert not said
    assert not (tmp_path / "out/modeling_x.py").is_symlink()


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (["onnx/model.onnx", "onnx/config.json"], "onnx/"),
        (["onnx/model.onnx", "onnx/model.onnx_data", "onnx/int8/x.onnx"], "onnx/"),
        (["openvino/openvino_model.bin", "openvino/openvino_model.xml"], "openvino/"),
        (["checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"], "checkpoint-500/"),
        (["original/consolidated.00.pth", "original/params.json"], "original/"),
        (["state/optimizer.pt", "state/scheduler.pt"], "state/optimizer.pt, state/scheduler.pt"),
    ],
)
def test_other_forms_of_the_weights_stay_behind(tmp_path, written, left, said):
    base = model(tmp_path / "base", *left, "config.json")
    assert written(base) == (["config.json", "model.safetensors"], said)


@pytest.mark.parametrize(
    "inner",
    [
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "adapters/one/adapter_model.safetensors",
    ],
)
def test_weights_of_subfolders_are_refused_before_anything_is_written(tmp_path, write, inner):
    base = model(tmp_path / "base", "1_Pooling/config.json", inner, f"{inner}.onnx")
    with open_weights(base) as like:
        with pytest.raises(InputError, match=rf"subfolders \({inner}\).*; merge each subfolder"):
            write(tmp_path / "out", ONE, like=like)
        assert not (tmp_path / "out").exists()
        write(tmp_path / "out.safetensors", ONE, like=like)  # which takes nothing along


def test_shards_in_a_subfolder_are_merged_and_not_refused(tmp_path, written):
    base = tmp_path / "base"
    model(base / "sub", "notes.txt")
    table = {"metadata": {}, "weight_map": {"a": "sub/model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(table))
    found, _ = written(base)
    assert found == ["model.safetensors", "sub/notes.txt"]


def test_a_folder_of_folders_says_which_hold_weights(tmp_path):
    for part in ("unet", "vae"):
        model(tmp_path / part)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"no weights; .* give one of them \(unet, vae\)"):
        open_weights(tmp_path)
