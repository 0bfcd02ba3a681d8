"""Two processes that write to one place leave the whole output of one of them."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cl_merge.errors import StorageError
from cl_merge.storage.files import atomic_folder, storage_errors

pytestmark = pytest.mark.slow


def test_two_merges_to_one_folder_leave_that_of_one(tmp_path):
    for number, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        weights = {f"w{i}": torch.full((1000,), float(number)) for i in range(50)}
        save_file(weights, tmp_path / name / "model.safetensors")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "cl_merge.cli", "merge", "base", task, "-o", "merged"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in ("one", "two")
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    codes = [process.returncode for process in running]
    assert 0 in codes
    for code, text in zip(codes, said, strict=True):
        assert (text == "") == (code == 0)
        assert text.count("\n") == (code != 0)
    (values,) = {
        float(w.unique()) for w in load_file(tmp_path / "merged/model.safetensors").values()
    }
    assert values in {0.5 * (1 + number) for number, code in enumerate(codes) if code == 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "one", "two"]


def test_a_folder_that_appears_meanwhile_is_left_as_it_is(tmp_path):
    place = tmp_path / "out"

    def write():
        with storage_errors(place), atomic_folder(place) as hidden:
            (hidden / "ours").touch()
            place.mkdir()
            (place / "theirs").touch()

    with pytest.raises(
        StorageError, match="out' cannot be written .*nothing that was there before"
    ):
        write()
    assert [path.name for path in place.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [place]
