"""However a merge is stopped, there is a whole output or none."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from file_cases import listed, write

from cl_merge import cli
from cl_merge.errors import StorageError
from cl_merge.merge_files import merge_checkpoints

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}


def test_a_merge_that_is_killed_leaves_no_output(tmp_path):
    command = [sys.executable, SUPPORT / "case_merge.py", "kill", tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["found"]
    assert len(found) == 12
    assert set(found) <= {"nothing", "whole"}
    assert found.count("nothing") >= 5


SLOW = """\
import time
from pathlib import Path
from cl_merge.mergers import MaxMagnitude

class Slow(MaxMagnitude):
    name = "slow"

    def fold(self, state, chunk, info):
        Path("started").touch()
        time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("number", "code", "word", "threads"),
    [
        (signal.SIGINT, 130, "interrupted", "1"),
        (signal.SIGINT, 130, "interrupted", "2"),
        (signal.SIGTERM, 143, "terminated", "2"),
    ],
)
def test_a_signal_ends_a_merge_at_once_and_with_one_line(tmp_path, number, code, word, threads):
    (tmp_path / "slow.py").write_text(SLOW)
    weights = {f"w{i}": torch.randn(10) for i in range(200)}
    base = write(tmp_path, "base", weights, "safetensors")
    words = ["merge", base, base, "-o", "out.safetensors", "--method", "slow.py:Slow"]
    merge = subprocess.Popen(
        [sys.executable, "-m", "cl_merge.cli", *words],
        cwd=tmp_path,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(600):
            if (tmp_path / "started").exists() or merge.poll() is not None:
                break
            time.sleep(0.05)
        begin = time.monotonic()
        merge.send_signal(number)
        said, complained = merge.communicate(timeout=20)
    finally:
        merge.kill()
    assert complained == f"cl-merge: {word}\n"
    assert said == ""
    assert merge.returncode == code
    assert time.monotonic() - begin < 8  # the rest of the merge takes longer
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["m.safetensors", "folder"])
def test_a_disk_that_is_full_from_the_start(files, out, name, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    check_storage_error(files, out / name, "No space left on device", capsys)


@pytest.mark.parametrize("name", ["m.safetensors", "folder"])
def test_a_disk_that_takes_no_more(files, out, name, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        check_storage_error(files, out / name, "File too large", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_to(files, out, capsys):
    out.chmod(0o500)
    check_storage_error(files, out / "m.safetensors", "Permission denied", capsys)


def check_storage_error(files, output, reason, capsys):
    base, tasks = files
    with pytest.raises(StorageError) as caught:
        merge_checkpoints(base, tasks, output)
    assert str(caught.value).startswith(f"'{output}' cannot be written ({reason})")
    assert listed(output.parent) == []
    assert cli.main(["merge", str(base), *map(str, tasks), "-o", str(output)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"cl-merge: '{output}' cannot be written ({reason})")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert listed(output.parent) == []
