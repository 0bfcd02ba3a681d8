"""A small run that has finished, to be damaged."""

import shutil

import pytest

from cl_merge import cli

RUN = [
    "stream.tasks=2",
    "stream.images_per_class=4",
    "stream.test_fraction=0.1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "compare=[sequential]",
]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rough") / "digits-2" / "seed0" / "sequential"
    assert cli.main(["run", *RUN, f"out={folder}"]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, in a folder like that of a suite."""
    return shutil.copytree(finished, tmp_path / "suite" / "digits-2" / "seed0" / "sequential")
