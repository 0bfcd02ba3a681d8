"""A stream that was stopped anywhere ends with the same bits as one that was not.

Run as a script, ``python test_resume.py FOLDER``, this imports everything once, and forks processes
that train a stream and are killed.
"""

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import QUIET, classifier, stream
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torchvision.transforms.functional import to_tensor

from cl_merge import fit_stream
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError, StorageError
from cl_merge.storage.files import load_state, save_state
from cl_merge.training.journal import Journal, only_process

pytestmark = pytest.mark.slow

EPOCHS = 3


def noisy(image):
    return to_tensor(image) + 0.1 * torch.randn(3, 8, 8)


class Count(Callback):
    """Counts epochs, and dies in one."""

    def __init__(self, at=None, error=RuntimeError):
        self.epochs, self.at, self.error = 0, at, error

    def on_train_epoch_start(self, trainer, pl_module):
        if self.epochs == self.at:
            raise self.error("stop")
        self.epochs += 1


def work(folder, *, callbacks=(), data=None, model=None, trainer=None, **options):
    """Train a stream with everything random that there is; what it left."""
    model = model or classifier()
    model.visual.insert(1, nn.Dropout(0.2))
    merge = MergeCallback("ties", directory=folder / "vectors")
    torch.manual_seed(time.time_ns())  # what comes before is of no effect
    options = {"seed": 0, "checkpoint_seconds": 0, "directory": folder} | options
    result = fit_stream(
        model,
        data or stream(train_transform=noisy),
        callbacks=[*callbacks, merge],
        trainer=trainer or QUIET | {"max_epochs": EPOCHS},
        **options,
    )
    return {
        "weights": digest(model.state_dict()),
        "merged": digest(merge.merged()),
        "tasks": merge.tasks,
        "metrics": result.tasks,
        "rows": {task: row.tolist() for task, row in result.accuracy.rows.items()}
        if result.accuracy
        else None,
        "costs": [cost.seconds > 0 and cost.peak_memory > 0 for cost in result.costs],
        "files": {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*.safetensors"))
        },
        "temporary": [str(file) for file in folder.rglob("*tmp*")],
    }


def digest(tensors):
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a stream leaves that was not stopped."""
    return work(tmp_path_factory.mktemp("whole"))


# Killed.


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What streams left that were killed and went on, by where they were killed."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, __file__, folder], check=True, env=environment, timeout=300)
    return json.loads((folder / "found.json").read_text())


def test_a_directory_changes_nothing(killed, tmp_path):
    without = work(tmp_path, directory=None)
    assert json.loads(json.dumps(without)) == killed["whole"]


@pytest.mark.parametrize("way", ["time", "before", "after", "within"])
def test_a_stream_that_was_killed_ends_with_the_same_bits(killed, way):
    found = {place: left for place, left in killed.items() if place.startswith(way)}
    assert len(found) >= 5
    for place, left in found.items():
        assert left == killed["whole"], f"killed {place}"


def kill_and_go_on(folder):
    """Kill a stream at many places, each twice or once, and note what it leaves."""
    begin = time.monotonic()
    found = {"whole": child(folder / "whole")}
    seconds = time.monotonic() - begin
    draw = random.Random(0)
    for number in range(5):
        place, at = folder / f"time{number}", [draw.uniform(0, seconds) for _ in range(2)]
        for kill in at:
            child(place, seconds=kill)
        found[f"time {at}"] = child(place)
    calls = json.loads((folder / "whole" / "calls.json").read_text())
    for way, number in (("before", 5), ("after", 5), ("within", 7)):
        total = calls["fsync" if way == "within" else "replace"]
        for call in sorted({1 + round(n * (total - 1) / (number - 1)) for n in range(number)}):
            place = folder / f"{way}{call}"
            assert child(place, die=(way, call)) is None
            found[f"{way} {call} of {total}"] = child(place)
    (folder / "found.json").write_text(json.dumps(found))


def child(place, *, seconds=None, die=("", 0)):
    """Train in a forked process; what it left, or None if it was killed."""
    outcome = place / "outcome.json"
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            calls = watch(*die)
            left = work(place)
            (place / "calls.json").write_text(json.dumps(calls))
            outcome.write_text(json.dumps(left))
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0
    return json.loads(outcome.read_text())


def watch(way, number):
    """Count what makes files whole; die before or after a rename, or with half a file."""
    calls = {"replace": 0, "fsync": 0}
    replace, fsync = os.replace, os.fsync

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def watched_replace(*arguments):
        calls["replace"] += 1
        if (way, number) == ("before", calls["replace"]):
            die()
        replace(*arguments)
        if (way, number) == ("after", calls["replace"]):
            die()

    def watched_fsync(handle):
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return fsync(handle)
        calls["fsync"] += 1
        if (way, number) == ("within", calls["fsync"]):
            file = Path(os.readlink(f"/proc/self/fd/{handle}"))
            size = file.stat().st_size
            os.truncate(file, size - 5 if file.name == "journal.jsonl" else size // 2)
            die()
        return fsync(handle)

    os.replace, os.fsync = watched_replace, watched_fsync
    return calls


# Stopped by an error.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_epoch_that_was_interrupted_is_repeated_and_no_other(tmp_path, whole, error):
    handler = signal.getsignal(signal.SIGINT)
    for at in (5, 1):  # the sixth epoch of all, then the second after that
        with pytest.raises((error, SystemExit)):
            work(tmp_path, callbacks=[Count(at, error)])
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it switched off
    count = Count()
    left = work(tmp_path, callbacks=[count])
    # 5 and 1 were whole; the last epoch of a task, which was the sixth, leaves no checkpoint.
    assert count.epochs == 3 * EPOCHS - 5 - 1
    assert comparable(left) == comparable(whole)


def comparable(left):
    return {name: value for name, value in left.items() if name not in ("temporary", "files")}


def test_a_disk_that_is_full_stops_a_stream_which_goes_on_when_it_is_not(
    tmp_path, whole, monkeypatch
):
    replace = os.replace
    for full in (2, 3, 4):  # a checkpoint, a task vector, the state after a training
        calls = []

        def fail(*arguments, calls=calls, full=full):
            calls.append(arguments)
            if len(calls) == full:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(*arguments)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match="No space left on device.*nothing .* is lost"):
            work(tmp_path)
    monkeypatch.undo()
    assert work(tmp_path) == whole


def test_on_task_end_is_repeated_until_it_returns_and_nothing_else_is(tmp_path, whole):
    called, tests = [], []

    class Tests(Callback):
        def on_test_start(self, trainer, pl_module):
            tests.append(1)

    def after(end):
        called.append((end.task.index, end.metrics, end.cost.seconds > 0, torch.rand(1).item()))
        if len(called) == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work(tmp_path, callbacks=[Tests()], on_task_end=after)
    count = Count()
    left = work(tmp_path, callbacks=[Tests(), count], on_task_end=after)
    assert [call[0] for call in called] == [0, 1, 1, 2]
    assert called[1] == called[2]
    assert count.epochs == EPOCHS
    assert len(tests) == 3
    assert comparable(left) == comparable(whole)


def test_a_finished_stream_is_recalled_and_trains_nothing(tmp_path, whole):
    work(tmp_path)
    count, model = Count(), classifier()
    assert work(tmp_path, callbacks=[count], model=model) == whole
    assert count.epochs == 0


def test_a_recalled_callback_installs_what_it_merged(tmp_path):
    installed = []
    for _ in range(2):
        model, merge = classifier(), MergeCallback("magmax")
        fit_stream(
            model,
            stream(),
            callbacks=[merge],
            trainer=QUIET | {"max_epochs": 1},
            directory=tmp_path,
        )
        merge.install(model)
        installed.append(digest(model.state_dict()))
    assert installed[0] == installed[1]


def test_without_evaluation_a_stream_goes_on_too(tmp_path, whole):
    with pytest.raises(RuntimeError):
        work(tmp_path, callbacks=[Count(4)], evaluate=False)
    left = work(tmp_path, evaluate=False)
    assert left["metrics"] == [{}, {}, {}]
    assert left["rows"] is None
    assert left["weights"] == whole["weights"]
    assert left["merged"] == whole["merged"]


def test_metrics_that_are_not_finite_come_back(tmp_path):
    class Odd(Callback):
        def on_test_epoch_end(self, trainer, pl_module):
            pl_module.log("odd", float("nan"))
            pl_module.log("third", 1 / 3)

    left, recalled = (
        work(tmp_path, callbacks=[Odd()], trainer=QUIET | {"max_epochs": 1}) for _ in range(2)
    )
    assert "nan" in str(left)
    assert str(left) == str(recalled)


def test_cost_is_the_sum_of_what_counted(tmp_path):
    class Slow(Count):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            time.sleep(0.3)

    ends = []
    with pytest.raises(RuntimeError):
        work(tmp_path, callbacks=[Slow(at=2)])
    before = load_state(tmp_path / "state.ckpt")["cl_merge"]
    assert before["task"] == 0
    assert before["trained"] is False
    assert before["cost"]["seconds"] > 0.6
    assert before["cost"]["peak_memory"] > 1 << 20
    work(tmp_path, callbacks=[Slow()], on_task_end=lambda end: ends.append(end.cost.seconds))
    assert ends[0] > before["cost"]["seconds"] + 0.3
    records = Journal(tmp_path / "journal.jsonl").records
    assert [r["cost"]["seconds"] for r in records if r.get("done") == "task"] == ends


def test_no_checkpoint_is_written_before_its_time_nor_in_a_last_epoch(tmp_path):
    written = []

    class Watch(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            written.append(trainer.current_epoch)

    work(tmp_path / "all", callbacks=[Watch()])
    assert written == [0, 1] * 3
    written.clear()
    steps = QUIET | {"max_steps": 6}
    work(tmp_path / "steps", callbacks=[Watch()], trainer=steps)
    assert written == [0] * 3
    written.clear()
    work(tmp_path / "seldom", callbacks=[Watch()], checkpoint_seconds=1000)
    assert written == []


@pytest.mark.parametrize("plateau", [False, True])
def test_schedules_by_epoch_and_logs_go_on(tmp_path, plateau):
    class Stepped(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.inner(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=plateau)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            if not plateau:
                return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]
            # One that lowers the rate after every epoch.
            schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=0.9, factor=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "monitor": "loss"},
            }

    def run(folder, at=None):
        def trainer(task):
            logger = CSVLogger(folder / "logs", version=f"task{task.index}-{at}")
            options = {"logger": logger, "max_epochs": EPOCHS, "log_every_n_steps": 1}
            return L.Trainer(**QUIET | options)

        model = Stepped()
        fit_stream(
            model,
            stream(),
            callbacks=[Count(at)],
            trainer=trainer,
            evaluate=False,
            seed=0,
            directory=folder / "stream",
            checkpoint_seconds=0,
        )
        return digest(model.state_dict())

    with pytest.raises(RuntimeError):
        run(tmp_path / "stopped", at=5)
    if not plateau:  # which has no checkpoints, and logs are written with those
        steps = (tmp_path / "stopped/logs/lightning_logs/task1-5/metrics.csv").read_text()
        assert len(steps.splitlines()) == 1 + 2 * 3  # two whole epochs
    assert run(tmp_path / "stopped") == run(tmp_path / "whole")


# Refused.


def test_the_directory_of_another_stream_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        work(tmp_path, callbacks=[Count(4)])
    for options, difference in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"evaluate": False}, "evaluate was True and is False"),
        ({"data": stream(tasks=2)}, "number of tasks was 3 and is 2"),
        (
            {"data": stream(order=[1, 0, 2, 3, 4, 5])},
            "name of task 0 was ",
        ),
        (
            {"data": stream(images_per_class=6)},
            "number of training images of task 0 was 24 and is 12",
        ),
    ):
        with pytest.raises(InputError) as caught:
            work(tmp_path, **options)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path} was made for another stream: {difference}")
        assert message.endswith("; name a new folder")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "state.ckpt").unlink(), "of 1 finished tasks, .* is missing"),
        (lambda folder: (folder / "journal.jsonl").unlink(), "journal.jsonl is missing"),
        (
            lambda folder: (folder / "journal.jsonl").write_text('{"session": 1}\n'),
            "that of something else",
        ),
        (lambda folder: rewind(folder, 0, trained=False), "is older, of task 0"),
        (lambda folder: rewind(folder, 2, trained=False), "is newer, of task 2"),
        (lambda folder: save_state(folder / "state.ckpt", {}), "journal tells of 1 finished"),
        (lambda folder: save_state(folder / "state.ckpt", {"a": 1}), "checkpoint of something"),
        (lambda folder: halve(folder / "state.ckpt"), "state.ckpt' is not a whole checkpoint"),
        (lambda folder: spoil_line(folder / "journal.jsonl"), "journal.jsonl, line 2"),
    ],
)
def test_a_directory_whose_files_do_not_fit_is_refused(tmp_path, spoil, message):
    with pytest.raises(RuntimeError):
        work(tmp_path, callbacks=[Count(4)])
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        work(tmp_path)


def rewind(folder, task, *, trained):
    state = load_state(folder / "state.ckpt")
    state["cl_merge"] |= {"task": task, "trained": trained}
    save_state(folder / "state.ckpt", state)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def spoil_line(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-3], *lines[2:]]) + "\n")


def test_another_model_is_refused(tmp_path):
    work(tmp_path, trainer=QUIET | {"max_epochs": 1})
    other = classifier()
    other.visual.append(nn.Linear(16, 16))
    with pytest.raises(InputError, match="state.ckpt is of another model: .*visual"):
        work(tmp_path, model=other)


@pytest.mark.filterwarnings(r"ignore:task 3 \(the 4th\) starts at other weights")
def test_a_callback_that_was_used_before_is_brought_to_where_the_stream_is(tmp_path):
    merge, options = MergeCallback(), {"trainer": QUIET | {"max_epochs": 1}, "directory": tmp_path}
    fit_stream(classifier(), stream(), callbacks=[merge], **options)
    expected = merge.merged()
    fit_stream(classifier(), stream(), callbacks=[merge], trainer=options["trainer"])
    assert merge.tasks == 6
    fit_stream(classifier(), stream(), callbacks=[merge], **options)
    assert merge.tasks == 3
    assert merge.merged() == expected


def test_a_directory_in_use_is_refused_but_its_holder_may_use_it(tmp_path):
    with only_process(tmp_path), only_process(tmp_path):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                fit_stream(classifier(), stream(), directory=tmp_path)
            except InputError as error:
                expected = f"{tmp_path} is in use by another process"
                code = 0 if str(error).startswith(expected) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        work(tmp_path, trainer=QUIET | {"max_epochs": 1})


def test_what_could_not_be_read_again_is_refused_when_it_is_written(tmp_path):
    model = classifier()
    model.hparams["where"] = tmp_path
    with pytest.raises(InputError, match=r"state.ckpt' could not be read again .*PosixPath"):
        work(tmp_path, model=model)
    assert not (tmp_path / "state.ckpt").exists()


if __name__ == "__main__":
    kill_and_go_on(Path(sys.argv[1]))
