"""The runs that the tests of loading and of exporting share."""

import export_cases
import pytest
import torch

from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.runs.settings import read_settings


@pytest.fixture(scope="session")
def glyph(tmp_path_factory):
    return export_cases.glyph(tmp_path_factory)


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    return export_cases.vit(tmp_path_factory)


@pytest.fixture(scope="session")
def aligned(tmp_path_factory):
    return export_cases.aligned(tmp_path_factory)


@pytest.fixture(scope="session")
def digits():
    """The test images of the runs, transformed as for `glyph`, with labels and tasks."""
    stream, _ = load_parts(read_settings(export_cases.SETTINGS))
    batches = list(stream.test_dataloader())
    return [torch.cat([batch[place] for batch in batches]) for place in range(3)]
