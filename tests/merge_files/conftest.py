"""What the tests of the engine share."""

import pytest
import torch
from file_cases import random_weights, tuned, write
from hypothesis import HealthCheck, settings

settings.register_profile(
    "engine", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("engine")

LAYOUT = {
    "weight": (torch.float32, (40, 30)),
    "wide": (torch.float32, (3, 100)),
    "bias": (torch.float32, (40,)),
    "half": (torch.float16, (9, 7)),
    "brain": (torch.bfloat16, (11,)),
    "double": (torch.float64, (5, 5)),
    "scalar": (torch.float32, ()),
    "empty": (torch.float32, (0, 3)),
    "steps": (torch.int64, ()),
    "mask": (torch.bool, (6,)),
}


@pytest.fixture
def base():
    return random_weights(LAYOUT, 0)


@pytest.fixture
def tasks(base):
    return [tuned(base, seed) for seed in range(3)]


@pytest.fixture
def files(tmp_path, base, tasks):
    """The base and the tasks as safetensors files, in a folder beside the output's."""
    folder = tmp_path / "inputs"
    base_file = write(folder, "base", base, "safetensors")
    return base_file, [write(folder, f"task{i}", t, "safetensors") for i, t in enumerate(tasks)]


@pytest.fixture
def out(tmp_path):
    """Where outputs go, and nothing else."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
