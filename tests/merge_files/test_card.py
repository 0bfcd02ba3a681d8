"""A merged folder has a model card: what it is made of, and the command that makes it again."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from file_cases import listed, random_weights, tuned, write
from huggingface_hub import ModelCard
from safetensors import safe_open

from cl_merge import cli
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import MaxMagnitude

LAYOUT = {
    "visual.w": (torch.float32, (8, 6)),
    "b": (torch.float32, (8,)),
    "bn.running_mean": (torch.float32, (8,)),
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = random_weights(LAYOUT, 0)
    for name, weights in (("base", base), ("one", tuned(base, 1)), ("two's", tuned(base, 2))):
        write(Path(name), "model", weights, "safetensors")
    for number in (0, 1):
        write(Path("."), f"f{number}", {n: t.abs() for n, t in base.items()}, "safetensors")
    Path("base/config.json").write_text('{"architectures": ["Some"]}')
    return tmp_path


def card(folder):
    found = ModelCard.load(Path(folder) / "README.md", ignore_metadata_errors=False)
    return found.data.to_dict(), found.text


def command(text):
    (block,) = text.split("```sh\n")[1:]
    return shlex.split(block.split("\n```")[0])


@pytest.mark.parametrize(
    "words",
    [
        ["base", "one", "two's"],
        ["base", "one", "two's", "--method", "ties", "--set", "density=[0.5,0.2]", "sign=count"],
        ["base", "one", "two's", "--scale", "visual.*=0.3", "--scale", "0.1", "--weight", "1", "-0.25"],
        ["base", "one", "--include", "v*", "b*", "--exclude", "b", "--dtype", "bfloat16"],
        ["base", "one", "two's", "--method", "random-mix", "--set", "seed=-3", "--buffers", "average"],
        ["base", "one", "two's", "--method", "fisher", "--importance", "f0.safetensors", "f1.safetensors"],
        ["--no-base", "one", "two's", "--method", "slerp", "--set", "t=0.1"],
        ["base", "one", "--method", "mine.py:half", "--scale", "1e-7"],
    ],
)  # fmt: skip
def test_the_command_of_the_card_makes_the_same_again(models, words, capsys):
    Path("mine.py").write_text(
        "from cl_merge.mergers import merge_method\n\n"
        "@merge_method(name='half')\ndef half(values): return values.mean(dim=0) / 2\n"
    )
    assert cli.main(["merge", *words, "--out", "out"]) == 0
    first = Path("out/model.safetensors").read_bytes()
    program, *again = command(card("out")[1])
    assert program == "cl-merge"
    assert again[-2:] == ["--out", "out"]
    assert cli.main([*again[:-1], "again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == first


def test_what_the_hub_reads_in_front(models):
    merge_checkpoints("base", ["one", "two's"], "out", weights=[1, 0.5])
    data, text = card("out")
    assert data == {
        "base_model": ["base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "cl-merge"],
    }
    assert "# out\n" in text
    assert "| base | `base` |" in text
    assert "| merged | `one`<br>`two's`, weight 0.5 |" in text
    assert "| method | magmax: " in text
    assert "| scale | 0.5 |" in text


def test_inputs_of_one_name_are_told_apart_by_their_folders(models, tmp_path):
    class Nameless(MaxMagnitude):
        name = "nameless"

    tasks = ["one/model.safetensors", "two's/model.safetensors"]
    merge_checkpoints("base", tasks, "out", method=Nameless())
    text = card("out")[1]
    assert "| merged | `one/model.safetensors`<br>`two's/model.safetensors` |" in text
    assert "| method | nameless |" in text  # and not what it is derived from
    assert command(text)[2:5] == ["base", *tasks]
    with safe_open("out/model.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["cl_merge.inputs"])
    assert [entry["file"] for entry in told] == ["base", *tasks]


def test_ids_of_the_hub_are_named_and_no_place_on_this_disk(models, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **_: str(models / repo.split("/")[1])
    )
    merge_checkpoints("org/base@v2", ["org/one", models / "two's"], "out", method="average")
    data, text = card("out")
    assert data["base_model"] == ["org/base", "org/one"]
    assert "| merged | `org/one`<br>`two's` |" in text
    assert str(models) not in text
    assert command(text)[2:5] == ["org/base@v2", "org/one", "two's"]


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("open_clip_config.json", "open_clip"),
        ("modules.json", "sentence-transformers"),
        ("x", None),
    ],
)
def test_the_library_is_that_of_the_base(models, file, library):
    Path("base/config.json").rename(f"base/{file}")
    merge_checkpoints("base", ["one"], "out")
    assert card("out")[0].get("library_name") == library


@pytest.mark.parametrize("name", ["README.md", "readme.MD"])
def test_the_licence_of_the_base_stays_but_not_its_card(models, name):
    Path("base", name).write_text("---\nlicense: mit\ntags: [x]\n---\n# Base\nlicense: none\n")
    merge_checkpoints("base", ["one"], "out")
    assert [n for n in listed("out") if n.lower() == "readme.md"] == ["README.md"]
    data, text = card("out")
    assert data.get("license") == ("mit" if name == "README.md" else None)
    assert "# Base" not in text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"license: mit\n", b"---\nlicense:\n"])
def test_a_card_that_is_none_does_no_harm(models, content):
    Path("base/README.md").write_bytes(content)
    merge_checkpoints("base", ["one"], "out")
    assert "license" not in card("out")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
@pytest.mark.parametrize("given", [("base", "one"), ("one", "base")])
def test_names_of_files_that_are_no_text(models, given):
    odd = os.fsdecode(b"b\xff")
    Path("base").rename(odd)
    base, task = (odd if name == "base" else name for name in given)
    merge_checkpoints(base, [task], "out")
    assert "`b\\udcff`" in card("out")[1]


def test_a_file_has_no_card_and_a_folder_of_a_file_has_one(models):
    merge_checkpoints("base", ["one"], "out.safetensors")
    merge_checkpoints("base/model.safetensors", ["one"], "out")
    assert listed("out") == ["README.md", "model.safetensors"]
    assert card("out")[0] == {"tags": ["merge", "cl-merge"]}
    assert json.loads(Path("base/config.json").read_text())  # the base is as it was
    assert not Path("README.md").exists()
