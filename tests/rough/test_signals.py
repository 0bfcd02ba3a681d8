"""Whatever ends a command from outside, it ends within seconds, says so, and can go on."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cl_merge import cli
from cl_merge.cli.process import terminated_as_interrupted

pytestmark = pytest.mark.slow

RUN = ["stream.tasks=2", "stream.images_per_class=4", "trainer.max_epochs=2000", "compare=false"]
# What other libraries warn of depends on their versions.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}


def start_in_background(folder, *words):
    """Start a command as the shell of a script does in the background: Ctrl-C is ignored."""
    command = [sys.executable, "-m", "cl_merge.cli", *words]
    return subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    for _ in range(1200):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert path.exists(), process.communicate()[1]


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    """A run that was asked to end while it trained, twice as ``timeout`` does it."""
    folder = tmp_path_factory.mktemp("terminated")
    process = start_in_background(folder, "run", *RUN, "out=run")
    wait_for(folder / "run" / "logs", process)
    process.send_signal(signal.SIGINT)
    process.terminate()
    process.terminate()
    begin = time.monotonic()
    said = process.communicate(timeout=60)[1]
    return folder, process.returncode, said, time.monotonic() - begin


def test_a_run_that_is_terminated_ends_in_seconds_and_says_how_to_go_on(terminated):
    _, code, said, seconds = terminated
    assert code == 143
    assert said == (
        "cl-merge: terminated; what was finished is kept; go on with: cl-merge run out=run\n"
    )
    assert seconds < 20


def test_a_run_that_was_terminated_leaves_its_folder_to_others(terminated, monkeypatch, capsys):
    folder, *_ = terminated
    monkeypatch.chdir(folder)
    # It is the same run: were the folder still held, this would be the first thing to be said.
    assert cli.main(["run", "out=run", "seed=1"]) == 2
    assert "seed" in capsys.readouterr().err
    assert not list(Path("run").rglob("*.tmp*"))


def test_an_interruption_within_a_destructor_is_not_lost():
    class Slow:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def work():
        Slow()
        gc.collect()
        time.sleep(5)

    with terminated_as_interrupted() as signals, pytest.raises(KeyboardInterrupt):
        work()
    assert signals.terminated


class Cut:
    """Is asked to end at its last call, and fails at cleaning up what that has cut."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, *_, **__):
        self.left -= 1
        if not self.left:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                raise AttributeError("half of it is missing")


@pytest.mark.parametrize(("name", "calls"), [("log_hyperparams", 1), ("save", 2)])
def test_an_interruption_stays_one_where_cleaning_up_fails(
    name, calls, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"lightning.pytorch.loggers.CSVLogger.{name}", Cut(calls))
    words = ["stream.tasks=2", "stream.images_per_class=4", "compare=false", "loggers=csv"]
    assert cli.main(["run", *words, "out=run"]) == 143
    assert capsys.readouterr().err.endswith(
        "cl-merge: terminated; what was finished is kept; go on with: cl-merge run out=run\n"
    )


def test_asking_twice_interrupts_once():
    with terminated_as_interrupted() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signals.terminated


def test_handlers_are_those_of_before_after_a_command():
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with terminated_as_interrupted():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_command_may_run_in_another_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["inspect", "none.pt"])))
    thread.start()
    thread.join()
    assert codes == [2]
    assert capsys.readouterr().err == (
        "cl-merge: there is no file or folder 'none.pt'; check the path\n"
    )
