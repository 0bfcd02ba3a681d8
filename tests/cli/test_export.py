"""``cl-merge export``: what it prints and leaves, and what it says of bad input."""

import json
import shutil

import export_cases
import pytest

from cl_merge import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return export_cases.vit(tmp_path_factory)


def test_it_says_what_it_has_written_and_where(vit, tmp_path, capsys):
    new = tmp_path / "deep" / "new"
    words = ["export", str(vit), "--format", "open_clip", "--method", "magmax-aligned"]
    assert cli.main([*words, "--out", str(new)]) == 0
    names = sorted(path.name for path in new.iterdir())
    assert names == [
        "README.md",
        "classes.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "preprocessing.json",
    ]
    size = sum(path.stat().st_size for path in new.iterdir()) / 1e6
    assert capsys.readouterr().out == (
        f"{new} is the model, {size:.1f} MB: {', '.join(names)}; README.md shows how to load it\n"
    )
    assert "| method | magmax-aligned |" in (new / "README.md").read_text()
    assert len(json.loads((new / "classes.json").read_text())) == 10


def error(capsys, *words):
    assert cli.main(["export", *map(str, words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("cl-merge: ").rstrip("\n")


def test_wrong_input_is_said_in_one_line(vit, tmp_path, capsys):
    new = ["-o", tmp_path / "new"]
    assert error(capsys, tmp_path / "no", "--format", "torch", *new) == (
        f"'{tmp_path / 'no'}' is no folder; expected that of a finished run"
    )
    assert error(capsys, vit, "--format", "onxx", *new).startswith(
        "unknown format 'onxx'; did you mean 'onnx'?"
    )
    assert error(capsys, vit, "--format", "torch", "-o", vit) == (
        f"the output '{vit}' is, or lies within, the input '{vit}'; give another place"
    )
    votes = ["--format", "huggingface", "--method", "magmax-statistics"]
    assert "; formats that can: torch" in error(capsys, vit, *votes, *new)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_said(vit, tmp_path, capsys):
    run = shutil.copytree(vit, tmp_path / "run", ignore=shutil.ignore_patterns("task_vectors"))
    weights = run / "merged.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = error(capsys, run, "--format", "torch", "-o", tmp_path / "new")
    assert said.startswith(f"'{weights}' is not a whole safetensors file (")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_format_and_output_must_be_given(vit, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(vit)])
    assert stop.value.code == 2
    assert "--format" in capsys.readouterr().err
