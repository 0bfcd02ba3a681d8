"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from cl_merge import TaskVector, cli
from cl_merge.benchmarks.runs.settings import read_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 220


def test_what_it_links_to_is_there():
    links = re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)="([^"]+)"', README)
    files = [one or other for one, other in links if "://" not in one]
    assert len(files) > 20
    assert not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.slow
def test_the_plug_in_example_can_be_pasted_and_the_regularizers_behind_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plug_in, regularizers = blocks("python")[:2]
    names = {}
    torch.manual_seed(0)
    exec(plug_in, names)
    merge, module = names["merge"], names["module"]
    assert merge.tasks == 3
    expected = {name: merge.base[name] + 0.5 * tensor for name, tensor in merge.merged().items()}
    assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())
    exec(regularizers, names)
    assert [callback.tasks for callback in names["callbacks"]] == [3, 3, 3]


def test_the_example_on_weights_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "base_state": {"weight": torch.zeros(10)},
        "tuned_state": {"weight": torch.arange(10.0)},
        "other": TaskVector({"weight": -torch.ones(10)}),
    }
    exec(blocks("python")[2], names)
    assert names["state"]["weight"].shape == (10,)
    assert TaskVector.load("task0.safetensors") == names["vector"]


@pytest.mark.parametrize(
    "line",
    [line for block in blocks("sh") for line in block.splitlines() if line[:8] == "cl-merge"],
)
def test_the_commands_are_valid(line):
    parsed = cli._parse(shlex.split(line)[1:])
    if parsed.command == "run":
        read_settings(parsed.settings)


def test_the_two_commands_stand_on_lines_of_their_own():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "cl-merge run" in commands[0]
    assert "pytest" in commands[1]
