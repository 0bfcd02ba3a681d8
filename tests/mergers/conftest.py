"""Task vectors for the tests of the mergers."""

import pytest
import torch
from hypothesis import settings

from cl_merge.mergers import Merger

# No deadline: how long one example takes says more about the machine than about the code.
settings.register_profile("mergers", deadline=None, max_examples=25)
settings.load_profile("mergers")


@pytest.fixture(params=[7, 1 << 18], ids=["small chunks", "one chunk"])
def any_chunk(request, monkeypatch) -> int:
    """Run a test with parameters cut into many chunks, and with none cut."""
    monkeypatch.setattr(Merger, "chunk_size", request.param)
    return request.param


@pytest.fixture
def make_vector():
    """Make a task vector of mixed shapes, dtypes and strides from a seed."""

    def make(seed: int, grid: bool = False) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            if grid:  # few values, exact in every dtype: many equal magnitudes and zero sums
                return torch.randint(-3, 4, shape, generator=generator) / 4.0
            return torch.randn(shape, generator=generator)

        return {
            "weight": normal(17, 5),
            "transposed": normal(9, 4).t(),
            "channels_last": normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "expanded": normal(3, 1).expand(3, 4),
            "strided": normal(20)[::3],
            "scalar": normal(),
            "empty": normal(0, 3),
            "double": normal(11).double(),
            "bfloat16": normal(11).bfloat16(),
            "half": normal(11).half(),
        }

    return make


@pytest.fixture(params=[1, 2, 3, 8], ids=lambda tasks: f"{tasks} tasks")
def tasks(request) -> int:
    """How many tasks there are; a file may have other numbers."""
    return request.param


@pytest.fixture(params=[False, True], ids=["normal", "grid"])
def vectors(request, tasks, make_vector) -> list[dict[str, torch.Tensor]]:
    """A task vector for each task, of values that are all different, or few."""
    return [make_vector(10 * tasks + task, grid=request.param) for task in range(tasks)]
