"""A run that is killed anywhere, and run again, ends with the same bits as one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One whole run; runs killed twice at random times; runs killed at every few writes."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    # Two pairs of times; every 16th and 19th flush, and every 5th rename.
    writes = ["31", "37", "10"]
    command = [sys.executable, SUPPORT / "killing.py", "case_run", folder, "2", *writes]
    subprocess.run(command, check=True, env=environment, timeout=900)
    return json.loads((folder / "found.json").read_text())


def test_the_whole_run_left_what_it_should(found):
    whole = found["whole"]
    assert set(whole["rest"]) == {
        ".lock",
        "accuracy_by_task.png",
        "accuracy_matrix.png",
        "config.yaml",
        "journal.jsonl",
        "logs",
        "merged.safetensors",
        "results.json",
        "task_vectors",
    }
    assert len(whole["files"]) == 9
    assert len(whole["results"]["methods"]) == 4


def test_every_killed_run_ends_with_the_same_bits(found):
    assert len(found["states"]) >= 16
    for when, outcome in found["killed"].items():
        for name, digest in found["whole"]["files"].items():
            assert outcome["files"].get(name) == digest, f"killed {when}: {name} differs"
        assert outcome == found["whole"], f"killed {when}"


def test_the_kills_fell_into_every_part_of_a_run(found):
    states = found["states"]
    assert {"nothing yet", "within a task", "a task trained"} <= set(states), states
