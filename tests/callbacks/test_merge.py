"""MergeCallback in a loop that knows nothing of this library."""

import re
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from plain import Plain, fit, loader, same, trainer, weights

from cl_merge import TaskVector, merge
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError


def test_test_sees_merged_weights_and_fit_continues_from_trained_ones():
    module, callback = Plain(), MergeCallback("magmax")
    base = weights(module)
    vectors = []
    for task in range(3):
        before = weights(module)
        trained = fit(module, callback, task)
        vectors.append(TaskVector.between(base, trained))
        trainer(callback).test(module, loader(0), verbose=False)
        expected = merge(vectors, method="magmax").apply_to(base, scale=0.5)
        assert same(module.seen["test"], expected)
        assert same(weights(module), trained)
        assert not same(trained, before)
    assert callback.tasks == 3
    assert same(dict(callback.merged()), dict(merge(vectors)))
    callback.install(module)
    assert same(weights(module), expected)


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_every_evaluation_outside_fit_sees_merged_weights(verb):
    module, callback = Plain(), MergeCallback("average", scale=0.3)
    base = weights(module)
    trained = fit(module, callback, 0)
    getattr(trainer(callback), verb)(module, loader(0))
    seen = module.seen["validation" if verb == "validate" else verb]
    assert same(seen, TaskVector.between(base, trained).apply_to(base, scale=0.3))
    assert same(weights(module), trained)


def test_validation_inside_fit_sees_the_weights_being_trained():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    runner = trainer(callback, num_sanity_val_steps=1)
    runner.fit(module, loader(1), loader(1))
    assert same(module.seen["validation"], weights(module))


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_trained_weights_are_back_after_an_exception_in_an_evaluation(verb):
    module, callback = Plain(), MergeCallback("magmax")
    trained = fit(module, callback, 0)

    def fail(batch, batch_idx):
        assert not same(weights(module), trained)
        raise RuntimeError("no")

    step = "validation_step" if verb == "validate" else f"{verb}_step"
    setattr(module, step, fail)
    with pytest.raises(RuntimeError, match="no"):
        getattr(trainer(callback), verb)(module, loader(0))
    assert same(weights(module), trained)


def test_a_fit_that_raises_counts_for_nothing():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    merged = dict(callback.merged())
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(module, callback, 1)
    assert callback.tasks == 1
    assert same(dict(callback.merged()), merged)


def test_a_fit_that_trains_nothing_is_no_task(caplog):
    module, callback = Plain(), MergeCallback("magmax")
    trainer(callback, limit_train_batches=0).fit(module, loader(0))
    trainer(callback, max_steps=0).fit(module, loader(0))
    assert callback.tasks == 0


def test_start_says_where_training_starts():
    base = weights(Plain())
    starts = {}
    for start in ("sequential", "independent", "merged"):
        module, callback = Plain(), MergeCallback("magmax", start=start)
        trained = fit(module, callback, 0)
        begun = {}

        class Record(L.Callback):
            def on_train_start(self, trainer, pl_module, begun=begun):
                begun.update(weights(pl_module))

        runner = trainer(callback, Record())
        runner.fit(module, loader(1))
        starts[start] = begun
        if start == "sequential":
            assert same(begun, trained)
        if start == "merged":
            assert same(begun, TaskVector.between(base, trained).apply_to(base, scale=0.5))
    assert same(starts["independent"], base)


def test_independent_training_does_not_depend_on_the_tasks_before():
    lone, callback = Plain(), MergeCallback("max-abs", start="independent")
    fit(lone, callback, 1)
    after, callback = Plain(), MergeCallback("max-abs", start="independent")
    fit(after, callback, 0)
    fit(after, callback, 1)
    assert same(weights(lone), weights(after))


def test_evaluating_changes_nothing_in_the_training_after_it():
    plain, tested = Plain(), Plain()
    first, second = MergeCallback("magmax"), MergeCallback("magmax")
    for task in range(2):
        fit(plain, first, task)
        fit(tested, second, task)
        trainer(second).test(tested, loader(0), verbose=False)
    assert same(weights(plain), weights(tested))


def test_before_any_task_evaluation_sees_the_weights_as_they_are():
    module, callback = Plain(), MergeCallback("magmax")
    trainer(callback).test(module, loader(0), verbose=False)
    assert same(module.seen["test"], weights(module))
    with pytest.raises(
        InputError, match="^nothing to install: no task has been trained and merged"
    ):
        callback.install(module)


def test_state_survives_a_checkpoint_and_weights_only_loading(tmp_path):
    module, callback = Plain(), MergeCallback("ties", density=0.5)
    fit(module, callback, 0)
    runner = trainer(callback, ModelCheckpoint(tmp_path, save_last=True))
    runner.fit(module, loader(1))
    runner.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert any("MergeCallback" in key for key in saved["callbacks"])

    fresh_module, fresh = Plain(), MergeCallback("ties", density=0.5)
    trainer(fresh).test(fresh_module, loader(0), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert fresh.tasks == 2
    assert same(dict(fresh.merged()), dict(callback.merged()))
    assert same(fresh_module.seen["test"], callback.merged().apply_to(callback.base, scale=0.55))


def test_testing_a_checkpoint_of_this_task_does_not_undo_its_fold(tmp_path):
    module, callback = Plain(), MergeCallback("magmax")
    checkpoint = ModelCheckpoint(tmp_path)
    runner = trainer(callback, checkpoint)
    runner.fit(module, loader(0))
    runner.test(module, loader(0), ckpt_path="best", verbose=False)
    assert callback.tasks == 1


def test_resuming_within_a_task_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole_module, whole = Plain(), MergeCallback("magmax", start="merged")
    fit(whole_module, whole, 0)
    fit(whole_module, whole, 1, max_epochs=4)

    module, callback = Plain(), MergeCallback("magmax", start="merged")
    fit(module, callback, 0)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    trainer(callback, checkpoint, max_epochs=4).fit(module, loader(1))
    second = next(path for path in tmp_path.iterdir() if "epoch=1" in path.name)

    resumed_module, resumed = Plain(), MergeCallback("magmax", start="merged")
    trainer(resumed, max_epochs=4).fit(resumed_module, loader(1), ckpt_path=second)
    assert resumed.tasks == 2
    assert same(weights(resumed_module), weights(whole_module))
    assert same(dict(resumed.merged()), dict(whole.merged()))


def test_resuming_at_the_very_end_of_a_task_still_merges_it(tmp_path):
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    trainer(callback, checkpoint, max_epochs=2).fit(module, loader(1))
    last = next(path for path in tmp_path.iterdir() if "epoch=1" in path.name)

    resumed_module, resumed = Plain(), MergeCallback("magmax")
    trainer(resumed, max_epochs=2).fit(resumed_module, loader(1), ckpt_path=last)
    assert resumed.tasks == 2
    assert same(dict(resumed.merged()), dict(callback.merged()))


def test_task_vectors_are_written_as_they_were_folded(tmp_path):
    module, callback = Plain(), MergeCallback("magmax", directory=tmp_path / "vectors")
    base = weights(module)
    for task in range(2):
        trained = fit(module, callback, task)
        saved = TaskVector.load(tmp_path / "vectors" / f"task{task}.safetensors")
        assert saved == TaskVector.between(base, trained)


def test_memory_does_not_grow_with_the_number_of_tasks():
    module, callback = Plain(), MergeCallback("ties")

    def held():
        def size(value):
            if isinstance(value, torch.Tensor):
                return value.nbytes
            return sum(map(size, value.values())) if isinstance(value, dict) else 0

        return size(callback.state_dict())

    fit(module, callback, 0)
    first = held()
    for task in range(1, 4):
        fit(module, callback, task)
    assert held() == first


def test_buffers_that_moved_are_named_in_a_warning():
    module, callback = Plain(batch_norm=True), MergeCallback("magmax")
    with pytest.warns(
        UserWarning,
        match=re.escape(
            "2 floating-point buffers moved during training and are not merged: net.1.running_mean, net.1.running_var."
        ),
    ):
        fit(module, callback, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*buffers moved.*")
        fit(module, callback, 1)


@pytest.mark.parametrize("choice", ["trained", "base", "average"])
def test_buffers_hold_what_was_chosen_during_evaluation_and_are_restored(choice):
    module, callback = Plain(batch_norm=True), MergeCallback("magmax", buffers=choice)
    start = module.net[1].running_mean.clone()
    means = []
    for task in range(2):
        fit(module, callback, task)
        means.append(module.net[1].running_mean.clone())
    seen = {}
    module.test_step = lambda batch, batch_idx: seen.update(mean=module.net[1].running_mean.clone())
    trainer(callback).test(module, loader(0), verbose=False)
    expected = {"trained": means[1], "base": start, "average": (means[0] + means[1]) / 2}
    torch.testing.assert_close(seen["mean"].cpu(), expected[choice].cpu())
    assert torch.equal(module.net[1].running_mean, means[1])


def test_weights_in_half_precision_keep_their_type():
    module, callback = Plain().to(torch.bfloat16), MergeCallback("magmax")
    trainer(callback, precision="bf16-true").fit(module, loader(0))
    trainer(callback, precision="bf16-true").test(module, loader(0), verbose=False)
    assert all(value.dtype == torch.bfloat16 for value in module.seen["test"].values())
    assert all(value.dtype == torch.float32 for value in callback.merged().values())


def test_a_task_that_diverged_is_named():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)

    class Poison(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.net[0].weight.data[0, 0] = float("nan")

    message = "task 1: the fine-tuned weights: NaN or infinity in net.0.weight."
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        trainer(Poison(), callback).fit(module, loader(1))
    assert callback.tasks == 1


def test_other_parameters_than_in_the_first_task_are_named():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    module.frozen.requires_grad_(True)
    module.net[0].bias.requires_grad_(False)
    message = (
        "the parameters that train are not those of the first task; no longer training: "
        "net.0.bias; new: frozen. Keep requires_grad as it was, or use a new MergeCallback"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(module, callback, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "magmx"},
            "unknown method 'magmx'; did you mean 'magmax'? Known: magmax, max-abs, average, task-arithmetic, random-mix, ties",
        ),
        (
            {"start": "sequentially"},
            "unknown start 'sequentially'; did you mean 'sequential'? Known: sequential, independent, merged",
        ),
        ({"buffers": "mean"}, "unknown choice of buffers 'mean'. Known: trained, base, average"),
        ({"scale": float("nan")}, "the scale must be a finite number, not nan"),
        ({"method": "ties", "density": 0}, "density must be a number above 0 and at most 1, not 0"),
        ({"densty": 1}, "unknown option of method 'magmax' 'densty'. Known: none"),
    ],
)
def test_wrong_options_are_named_at_once(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        MergeCallback(**options)


def test_strategies_that_shard_are_refused():
    stub = type("Trainer", (), {"strategy": FSDPStrategy()})()
    with pytest.raises(RuntimeError, match="^MergeCallback needs whole parameters on every rank"):
        MergeCallback("magmax").setup(stub, Plain(), "fit")


def test_strategies_that_spawn_are_refused():
    spawning = trainer(strategy="ddp_spawn", devices=2, accelerator="cpu")
    with pytest.raises(RuntimeError, match="^MergeCallback keeps its state in the process, but"):
        MergeCallback("magmax").setup(spawning, Plain(), "fit")


def test_several_callbacks_in_one_trainer_keep_their_states_apart():
    keys = {
        MergeCallback("magmax").state_key,
        MergeCallback("ties").state_key,
        MergeCallback("magmax", start="independent").state_key,
    }
    assert len(keys) == 3
