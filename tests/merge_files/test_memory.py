"""What a merge takes of memory depends neither on the model's size nor on the number of tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="needs Linux' account of memory"
    ),
]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """The most memory, in MB: of 4 and of 24 million bfloat16 weights."""
    command = [
        sys.executable,
        SUPPORT / "case_merge.py",
        "memory",
        tmp_path_factory.mktemp("memory"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_size_of_the_model(peaks):
    # A few chunks for each thread; the accumulators of all would be 290 MB.
    assert peaks["large ties 1"] < peaks["small ties 1"] + 90


def test_memory_does_not_grow_with_the_number_of_tasks(peaks):
    assert peaks["small ties 12"] < peaks["small ties 1"] + 25
    assert peaks["small magmax 12"] < 60


def test_task_vectors_of_zeros_take_no_more_memory(peaks):
    assert peaks["sparse large ties 1"] < peaks["large ties 1"] + 60
