"""Memory does not grow with the number of tasks: measured, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import gc, json, sys
import torch
from cl_merge.mergers import merge
from cl_merge.task_vectors.task_vector import TaskVector

torch.set_num_threads(1)  # as fast beside other work as alone
PARAMETERS, SIZE = 8, 2 * 2**20  # 8 MiB each, 64 MiB together


def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def vector(size):
    return TaskVector({str(i): torch.linspace(-1, i, size) for i in range(PARAMETERS)})


def fold(methods, size):
    for method in methods:
        merge((vector(size) for _ in range(8)), method)
        gc.collect()


fold(["magmax", "average", "task-arithmetic", "random-mix", "ties"], 2**10)  # load all code
one = PARAMETERS * SIZE * 4 / 1024
before = kilobytes("VmRSS")
ratios = {}
# The peak of a process only rises: the modest ones first.
for name, methods in {
    "others": ["magmax", "average", "task-arithmetic", "random-mix"],
    "ties": ["ties"],
}.items():
    fold(methods, SIZE)
    ratios[name] = (kilobytes("VmHWM") - before) / one
print(json.dumps(ratios))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_folding_eight_vectors_takes_the_memory_of_a_few():
    """Peak of folding and merging, the vector in hand and the result counted, in vectors."""
    # Otherwise glibc may keep freed blocks for later, and the peak tells of its habits, not of ours.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=environment,
    )
    ratios = json.loads(done.stdout)
    assert ratios["others"] <= 2.5
    assert ratios["ties"] <= 4.5
