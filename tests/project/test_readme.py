"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge import TaskVector
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.callbacks import EWC, LwF, MergeCallback

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(language: str, holding: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(text for text in blocks if holding in text)


class Anybody(L.LightningModule):
    """A module that knows nothing of this library."""

    def __init__(self):
        super().__init__()
        self.layer = self.net = nn.Linear(4, 3)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def test_step(self, batch, batch_idx):
        self.log("norm", self.layer.weight.norm())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 4, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)


def test_the_regularizers_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"L": L, "LwF": LwF, "EWC": EWC, "MergeCallback": MergeCallback}
    names |= {"module": Anybody(), "tasks": [loader(0), loader(1)]}
    exec(block("python", "LwF(target"), names)
    assert [callback.tasks for callback in names["callbacks"]] == [2, 2, 2]


def test_the_plug_in_example_trains_tests_and_keeps_the_merged_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Anybody()
    names = {
        "L": L,
        "MergeCallback": MergeCallback,
        "module": module,
        "tasks": [loader(0), loader(1)],
        "test_loader": loader(2),
    }
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    exec(block("python", "MergeCallback("), names)
    assert names["merge"].tasks == 2
    expected = names["merge"].merged().apply_to(base, scale=0.5)
    assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())


def test_the_example_on_weights_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"weight": torch.zeros(10)}
    names = {
        "base_state": base,
        "tuned_state": {"weight": torch.arange(10.0)},
        "other": TaskVector({"weight": -torch.ones(10)}),
    }
    exec(block("python", "TaskVector.between"), names)
    assert names["state"]["weight"].shape == (10,)
    assert TaskVector.load("task0.safetensors") == names["vector"]


@pytest.mark.parametrize(
    "line", [line for line in block("sh", "data=/photos").splitlines() if "--help" not in line]
)
def test_the_commands_are_valid(line):
    read_settings(shlex.split(line)[2:])


def test_the_two_commands_stand_on_lines_of_their_own():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "cl-merge run" in commands[0]
    assert "pytest" in commands[1]
