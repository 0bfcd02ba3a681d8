"""What several tests need."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test may wait for a hub; read by the hub's client when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and published orders, where there is one."""
    folder = Path(os.environ.get("CL_MERGE_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no folder of real data at {folder}; set CL_MERGE_SHARED to one")
    return folder


@pytest.fixture(autouse=True)
def methods_of_users() -> Iterator[None]:
    """Forget the methods that a test has defined: they are known to the whole process."""
    from cl_merge.mergers import MERGERS

    before = dict(MERGERS)
    yield
    MERGERS.clear()
    MERGERS.update(before)
