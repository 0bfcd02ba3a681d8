"""A small run that has finished, to be damaged."""

import shutil

import export_cases
import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return export_cases.glyph(tmp_path_factory)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, in a folder like that of a suite."""
    return shutil.copytree(finished, tmp_path / "suite" / "digits-2" / "seed0" / "sequential")
