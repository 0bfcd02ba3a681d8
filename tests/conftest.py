"""What several tests need."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test may wait for a hub; read by the hub's client when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests side by side share the cores; read by torch when it is imported, and by what tests start.
# Only in the processes that test: they would inherit what the one that started them has.
_SIDE_BY_SIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if _SIDE_BY_SIDE:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _SIDE_BY_SIDE)))

# A job in the background of a shell ignores interruptions, and so does all that it starts. Tests
# interrupt themselves and what they start, however pytest itself was started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
