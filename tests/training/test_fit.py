"""fit_stream: one fit per task, evaluation after each."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET, classifier, stream

from cl_merge import TaskVector, fit_stream, merge
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import copies, swapped, trained_parameters

TRAINER = QUIET | {"max_epochs": 2}


def test_a_stream_ends_with_the_whole_accuracy_matrix():
    model, data, callback = classifier(), stream(), MergeCallback("magmax")
    result = fit_stream(model, data, callbacks=[callback], trainer=TRAINER, seed=0)
    assert callback.tasks == 3
    assert result.accuracy.accuracy().shape == (3, 3)
    assert result.accuracy.total.tolist() == [10, 10, 10]
    logged = result.tasks[-1]["test/accuracy"]
    assert result.accuracy.metrics()["accuracy"] == pytest.approx(logged)
    assert [set(metrics) for metrics in result.tasks] == [
        {"test/accuracy", "test/task_aware_accuracy", "test/seen_accuracy"}
    ] * 3
    assert all(cost.seconds > 0 and cost.peak_memory > 1 << 20 for cost in result.costs)


def test_the_matrix_is_that_of_the_merged_weights():
    model, data, callback = classifier(), stream(), MergeCallback("magmax")
    base, vectors, rows = copies(trained_parameters(model)), [], []

    def check(end):
        trained = copies(trained_parameters(end.model))
        vectors.append(TaskVector.between(base, trained))
        merged = merge(vectors).apply_to(base, scale=0.5)
        images, labels, tasks = next(iter(stream(batch_size=100).test_dataloader()))
        with swapped(trained_parameters(end.model), merged), torch.no_grad():
            hits = end.model(images).argmax(dim=1) == labels
        rows.append([int(hits[tasks == task].sum()) for task in range(3)])

    result = fit_stream(
        model, data, callbacks=[callback], trainer=TRAINER, seed=0, on_task_end=check
    )
    assert result.accuracy.correct().tolist() == rows


def test_same_seed_same_bits():
    def run(seed, evaluate=True):
        model, callback = classifier(), MergeCallback("magmax")
        fit_stream(
            model,
            stream(seed=seed),
            callbacks=[callback],
            trainer=TRAINER,
            seed=seed,
            evaluate=evaluate,
        )
        return callback.merged()

    first = run(1)
    torch.rand(3)
    assert run(1) == first
    assert run(1, evaluate=False) == first
    assert run(2) != first


def test_every_task_has_a_trainer_of_its_own(tmp_path):
    made = []

    def make(task):
        made.append(task.index)
        checkpoint = ModelCheckpoint(tmp_path / f"task{task.index}")
        options = TRAINER | {"enable_checkpointing": True, "callbacks": [checkpoint]}
        return L.Trainer(**options)

    steps, order = [], []

    def record(end):
        steps.append(end.trainer.global_step)
        order.append([type(c).__name__ for c in end.trainer.callbacks][-2:])

    fit_stream(
        classifier(), stream(), callbacks=[MergeCallback()], trainer=make, on_task_end=record
    )
    assert made == [0, 1, 2]
    assert steps == [6, 6, 6]
    assert order == [["MergeCallback", "ModelCheckpoint"]] * 3
    assert all(list((tmp_path / f"task{task}").glob("*.ckpt")) for task in range(3))


SHARED = L.Trainer(**TRAINER)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (lambda _: SHARED, r"for task 1 \(the 2nd\), a Trainer that has trained another"),
        (SHARED, r"trainer is a Trainer.*expected the arguments.*or a function"),
        (TRAINER | {"strategy": "ddp_fork"}, "spawned processes lose .*; use strategy='ddp'"),
        (lambda _: L.Trainer(**TRAINER, strategy="ddp_spawn"), "use strategy='ddp'"),
    ],
    ids=["one for all", "no function", "forked", "spawned"],
)
def test_trainers_that_cannot_train_a_stream_are_refused(trainer, message):
    with pytest.raises(InputError, match=message):
        fit_stream(classifier(), stream(), trainer=trainer)


@pytest.mark.parametrize(
    "trainer",
    [
        lambda merge: QUIET | {"callbacks": [merge]},
        lambda merge: lambda task: L.Trainer(**QUIET, callbacks=[merge]),
    ],
)
def test_a_callback_that_would_see_each_task_twice_is_refused(trainer):
    merge = MergeCallback()
    with pytest.raises(InputError, match="^MergeCallback is among the callbacks of the stream and"):
        fit_stream(classifier(), stream(), callbacks=[merge], trainer=trainer(merge))
    assert merge.tasks == 0


def test_a_trainer_may_test_nothing_and_a_folder_be_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = TRAINER | {"limit_test_batches": 0}
    result = fit_stream(classifier(), stream(), trainer=trainer, directory="~/stream")
    assert result.accuracy is None
    assert result.tasks == [{}, {}, {}]
    assert (tmp_path / "stream" / "journal.jsonl").exists()


def test_without_evaluation_there_is_no_matrix():
    result = fit_stream(classifier(), stream(), trainer=TRAINER, evaluate=False)
    assert result.accuracy is None
    assert result.tasks == [{}, {}, {}]


@pytest.mark.parametrize("start", ["sequential", "independent", "merged"])
def test_every_start_runs_through(start):
    callback = MergeCallback("magmax", start=start)
    result = fit_stream(classifier(), stream(), callbacks=[callback], trainer=TRAINER, seed=0)
    assert result.accuracy.metrics()["task_aware_accuracy"] > 45
