"""MergeCallback in a loop that knows nothing of this library."""

import re
import warnings
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from plain import SAFE, Plain, fit, loader, same, trainer, weights
from safetensors.torch import load_file
from torch import nn

from cl_merge import TaskVector, get_merger, merge
from cl_merge.callbacks import MergeCallback
from cl_merge.callbacks.auto_scale import AutoScale
from cl_merge.errors import InputError, listing
from cl_merge.mergers import MERGERS
from cl_merge.mergers.base import Merger
from cl_merge.storage.quantize import STORES


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


def test_a_merger_that_was_used_before_is_not_evaluated_before_a_fit():
    merger = get_merger("magmax")
    merger.update({name: torch.ones_like(p) for name, p in weights(Plain()).items()})
    module, callback = Plain(), MergeCallback(merger)
    before = weights(module)
    message = (
        "^the Merger 'magmax' has folded task vectors before, but the weights that they start from"
    )
    for use in (callback.install, lambda m: trainer(callback).test(m, loader(0), verbose=False)):
        with pytest.raises(InputError, match=message):
            use(module)
    assert same(weights(module), before)


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


class Interrupted(Callback):
    """Writes a checkpoint in the second step, and is stopped in the third."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == 3:
            raise KeyboardInterrupt


def test_looking_at_a_checkpoint_of_within_the_first_task_counts_for_nothing(tmp_path):
    module, callback, path = Plain(), MergeCallback(scale=1.0), tmp_path / "within.ckpt"
    with pytest.raises(SystemExit):
        fit(module, [callback, Interrupted(path)], 0)
    trainer(callback).test(module, loader(0), ckpt_path=path, verbose=False, **SAFE)
    seen = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(module.seen["test"], {n: seen[n] for n in module.seen["test"]})
    assert callback.tasks == 0
    fit(module, callback, 0)
    assert callback.tasks == 1


def test_an_interrupted_task_that_is_ended_by_hand_is_in_checkpoints_once(tmp_path):
    module, callback, path = Plain(), MergeCallback("task-arithmetic"), tmp_path / "after.ckpt"
    runner = trainer(callback, Interrupted(tmp_path / "within.ckpt"))
    with pytest.raises(SystemExit):
        runner.fit(module, loader(0))
    callback.stream.end_task()
    runner.save_checkpoint(path)
    other = MergeCallback("task-arithmetic")
    trainer(other).test(Plain(), loader(0), ckpt_path=path, verbose=False, **SAFE)
    assert other.tasks == 1
    assert same(dict(other.merged()), dict(callback.merged()))


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

    message = "task 1 (the 2nd): the fine-tuned weights: NaN or infinity in net.0.weight."
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        trainer(Poison(), callback).fit(module, loader(1))
    assert callback.tasks == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "magmx"},
            "unknown method 'magmx'; did you mean 'magmax'? Known: " + listing(MERGERS, limit=30),
        ),
        (
            {"start": "sequentially"},
            "unknown start 'sequentially'; did you mean 'sequential'? Known: sequential, independent, merged",
        ),
        ({"buffers": "mean"}, "unknown choice of buffers 'mean'. Known: trained, base, average"),
        (
            {"store": "int3"},
            "unknown store 'int3'; did you mean 'int8'? Known: " + listing(STORES, 5),
        ),
        ({"device": "cdua"}, "device=cdua: no such device; expected as in 'cpu', 'cuda'"),
        ({"importance_samples": 0}, "importance_samples=0; expected 1 or more"),
        ({"held_out": list}, "held_out is for scale='auto', but the scale is 0.5"),
        ({"include": "net.*"}, "include must be a list of patterns, as in ['net.*']"),
        ({"scale": float("nan")}, "the scale must be a finite number, not nan"),
        ({"method": "ties", "density": 0}, "density must be a number above 0 and at most 1, not 0"),
        ({"densty": 1}, "unknown option of method 'magmax' 'densty'. Known: none"),
        (
            {"excludes": 1},
            "unknown option of method 'magmax' 'excludes'. Known: none; did you mean 'exclude'?",
        ),
        (
            {"method": get_merger("ties"), "density": 0.3},
            "option density beside a ready Merger 'ties', which has its own; give options where it "
            "is made, or beside its name, 'ties'",
        ),
    ],
)
def test_wrong_options_are_named_at_once(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        MergeCallback(**options)


def test_layers_may_have_scales_of_their_own():
    module, callback = Plain(), MergeCallback("magmax", scale={"net.0.*": 0.1, "*.bias": 0.2})
    base = weights(module)
    vector = TaskVector.between(base, fit(module, callback, 0))
    trainer(callback).test(module, loader(0), verbose=False)
    factors = {"net.0.weight": 0.1, "net.0.bias": 0.1, "net.2.weight": 0.5, "net.2.bias": 0.2}
    for name, factor in factors.items():
        assert torch.equal(module.seen["test"][name], vector.apply_to(base, factor)[name])
    assert callback.scale == {"net.0.*": 0.1, "*.bias": 0.2, "*": 0.5}


def test_a_scale_that_is_set_later_must_fit_too():
    module, callback = Plain(), MergeCallback()
    fit(module, callback, 0)
    with pytest.raises(InputError, match="scale: the pattern 'nett.*' fits no parameter"):
        callback.scale = {"nett.*": 0.1}
    callback.scale = {"frozen": 0.1, "net.0.*": 0.2}
    assert callback.scale == {"frozen": 0.1, "net.0.*": 0.2, "*": 0.5}


def test_a_state_of_parameters_that_are_left_out_now_is_named(tmp_path):
    module, callback, path = Plain(), MergeCallback(), tmp_path / "task0.ckpt"
    runner = trainer(callback)
    runner.fit(module, loader(0))
    runner.save_checkpoint(path)
    other = MergeCallback(exclude=["*.bias"])
    message = "saved state merged net.0.bias, net.2.bias, which include and exclude leave out now"
    with pytest.raises(InputError, match=message):
        trainer(other).test(Plain(), loader(0), ckpt_path=path, verbose=False, **SAFE)


@pytest.mark.parametrize("left_out", ["trained", "base"])
def test_what_is_left_out_is_not_merged_and_shows_what_was_chosen(left_out, tmp_path):
    module = Plain()
    callback = MergeCallback(
        include=["net.*"], exclude=["*.bias"], left_out=left_out, directory=tmp_path
    )
    base = weights(module)
    trained = fit(module, callback, 0)
    trainer(callback).test(module, loader(0), verbose=False)
    merged = {"net.0.weight", "net.2.weight"}
    assert TaskVector.load(tmp_path / "task0.safetensors").keys() == merged
    assert callback.merged().keys() == merged
    for name, seen in module.seen["test"].items():
        kept = {"trained": trained, "base": base}[left_out][name]
        assert torch.equal(seen, kept) == (name not in merged)
    assert same(weights(module), trained)


@pytest.mark.parametrize("options", [{"exclude": ["net.1*"]}, {"scale": {"net.1*": 1.0}}])
def test_patterns_that_fit_nothing_stop_the_first_fit_before_it_trains(options):
    module, callback = Plain(), MergeCallback("magmax", **options)
    before = weights(module)
    with pytest.raises(InputError, match=r"the pattern 'net.1\*' fits no parameter"):
        fit(module, callback, 0)
    assert same(weights(module), before)


@pytest.mark.parametrize("store", STORES)
def test_merging_the_files_gives_what_the_run_gave_whatever_the_store(store, tmp_path):
    module, callback = Plain(), MergeCallback("ties", store=store, directory=tmp_path)
    base = weights(module)
    for task in range(3):
        fit(module, callback, task)
    files = [TaskVector.load(tmp_path / f"task{task}.safetensors") for task in range(3)]
    merged = merge(files, method="ties")
    assert merged == callback.merged()
    callback.install(module)
    assert same(weights(module), merged.apply_to(base, 0.55))


def test_a_coarse_store_goes_on_after_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    runs = []
    for stopped in (False, True):
        module, callback = Plain(), MergeCallback("random-mix", store="bf16")
        fit(module, callback, 0)
        if stopped:
            state = callback.state_dict()
            callback = MergeCallback("random-mix", store="bf16")
            callback.load_state_dict(state)
        fit(module, callback, 1)
        runs.append(dict(callback.merged()))
    assert same(*runs)


def held_out():
    return loader(7)


def test_the_automatic_scale_is_the_best_one_on_the_held_out_images(caplog):
    module, callback = Plain(), MergeCallback("average", scale="auto", held_out=held_out)
    base = weights(module)
    with caplog.at_level("INFO", "cl_merge"):
        trained = fit(module, callback, 0)
    assert same(weights(module), trained)
    assert module.training
    vector = TaskVector.between(base, trained)

    def correct(scale):
        probe = Plain()
        probe.load_state_dict(vector.apply_to(base, scale), strict=False)
        return sum(int((probe(x).argmax(dim=1) == y).sum()) for x, y in held_out())

    assert correct(callback.scale) == max(correct(step / 10) for step in range(1, 16, 2))
    assert callback.chosen == [callback.stream.scales]
    assert f"scale {callback.stream.scales} gets " in caplog.text
    assert "of 24 held-out images right, the best of" in caplog.text
    trainer(callback).test(module, loader(0), verbose=False)
    assert same(module.seen["test"], vector.apply_to(base, callback.scale))


def test_the_automatic_scale_survives_a_checkpoint():
    module, callback = Plain(), MergeCallback("average", scale="auto", held_out=held_out)
    for task in range(2):
        fit(module, callback, task)
    fresh = MergeCallback("average", scale="auto", held_out=held_out)
    fresh.load_state_dict(callback.state_dict())
    assert fresh.chosen == callback.chosen
    assert len(fresh.chosen) == 2
    assert fresh.scale == callback.scale


def test_choosing_a_scale_changes_nothing_in_the_training():
    plain, choosing = Plain(batch_norm=True), Plain(batch_norm=True)
    first = MergeCallback("magmax", buffers="average")
    second = MergeCallback("magmax", buffers="average", scale="auto", held_out=held_out)
    for task in range(2):
        fit(plain, first, task)
        fit(choosing, second, task)
    assert same(weights(plain), weights(choosing))
    assert same(dict(plain.named_buffers()), dict(choosing.named_buffers()))


def test_groups_of_layers_get_scales_of_their_own():
    scale = AutoScale(groups="block")
    module, callback = Plain(), MergeCallback("average", scale=scale, held_out=held_out)
    fit(module, callback, 0)
    plain = callback.scale
    assert not isinstance(plain, dict) or list(plain) == ["net.0.*", "net.2.*", "*"]


def test_other_batches_need_a_function_that_makes_logits():
    def named():
        return [{"x": images, "y": labels} for images, labels in loader(7)]

    module, callback = Plain(), MergeCallback("average", scale="auto", held_out=named)
    before = weights(module)
    with pytest.raises(InputError, match=r"of type dict; give scale=AutoScale\(logits=...\)"):
        fit(module, callback, 0)
    assert same(weights(module), before)
    scale = AutoScale(logits=lambda module, batch: (module(batch["x"]), batch["y"]))
    by_name = MergeCallback("average", scale=scale, held_out=named)
    plain = MergeCallback("average", scale="auto", held_out=held_out)
    for callback in (by_name, plain):
        fit(Plain(), callback, 0)
    assert by_name.chosen == plain.chosen


def test_without_held_out_images_the_first_fit_stops_before_it_trains():
    module, callback = Plain(), MergeCallback("magmax", scale="auto")
    before = weights(module)
    with pytest.raises(InputError, match=r"^scale='auto' needs images that are not trained on: "):
        fit(module, callback, 0)
    assert same(weights(module), before)
    with pytest.raises(InputError, match="^there is no held-out image to choose the scale on$"):
        fit(Plain(), MergeCallback("magmax", scale="auto", held_out=list), 0)


class Weighing(Merger):
    """The weighted mean of task vectors."""

    name = "weighing"
    published_scale = 1.0
    weighted = True
    accumulators: ClassVar = {"sum": torch.float32, "weight": torch.float32}

    def fold(self, state, chunk, info):
        state["sum"].addcmul_(chunk, info.importance)
        state["weight"].add_(info.importance)

    def compute(self, state, out, info):
        torch.div(state["sum"], state["weight"].clamp_min(1e-12), out=out)


def test_mergers_that_weigh_elements_are_given_the_fisher_of_each_task(tmp_path):
    module = Plain()
    callback = MergeCallback(Weighing(), directory=tmp_path, exclude=["*.bias"])
    base, vectors, importances = weights(module), [], []
    for task in range(2):
        trained = fit(module, callback, task)
        vectors.append(TaskVector.between(base, trained))
        importances.append(load_file(tmp_path / f"importance{task}.safetensors"))
    reference = Weighing()
    for vector, importance in zip(vectors, importances, strict=True):
        assert all(bool((f >= 0).all()) and bool(f.any()) for f in importance.values())
        reference.update({name: vector[name] for name in importance}, importance)
    assert importances[0].keys() == {"net.0.weight", "net.2.weight"}
    assert reference.merged() == callback.merged()
    assert not same(*importances)


def test_heads_that_are_left_out_and_go_need_no_importance():
    module, callback = Plain(), MergeCallback("fisher", exclude=["head.*"])
    module.head = nn.ModuleDict({"first": nn.Linear(3, 3)})
    module.forward = lambda images: next(iter(module.head.values()))(module.net(images))
    fit(module, callback, 0)
    module.head = nn.ModuleDict({"second": nn.Linear(3, 3)})
    fit(module, callback, 1)
    assert callback.tasks == 2


def test_the_importance_is_estimated_from_as_many_samples_as_asked(tmp_path):
    counted = []
    for samples in (None, 5):
        module = Plain()
        module.task_logits = lambda b, m=module: counted.append(len(b[0])) or (m(b[0]), b[1])
        fit(module, MergeCallback(Weighing(), importance_samples=samples), 0)
    # One batch is tried before the training, and one sample of it.
    assert counted == [8, 1] + [1] * 24 + [8, 1] + [1] * 5


def test_methods_that_keep_every_task_vector_say_once_how_much_that_is(caplog):
    callback = MergeCallback("tsv")
    with caplog.at_level("INFO", "cl_merge"):
        module = Plain()
        for task in range(2):
            fit(module, callback, task)
    told = [record.message for record in caplog.records if "keeps every" in record.message]
    assert told == ["method 'tsv' keeps every task vector in memory: 0.0 MiB per task on cpu"]


def test_a_device_may_be_named():
    module, callback = Plain(), MergeCallback("magmax", device="cpu")
    fit(module, callback, 0)
    assert {tensor.device.type for tensor in callback.merged().values()} == {"cpu"}


def devices_of(state):
    if isinstance(state, torch.Tensor):
        return {state.device.type}
    return set().union(*map(devices_of, state.values())) if isinstance(state, dict) else set()


@pytest.mark.parametrize(("device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_what_came_from_a_checkpoint_follows_the_module_unless_a_device_is_named(device, expected):
    module, callback = Plain(batch_norm=True), MergeCallback("ties", buffers="average")
    fit(module, callback, 0)
    fresh = MergeCallback("ties", buffers="average", device=device)
    fresh.load_state_dict(callback.state_dict())
    assert devices_of(fresh.state_dict()) == {"cpu"}
    fresh.stream.move_state_to(torch.device("meta"))
    assert devices_of(fresh.state_dict()) == {expected}


def test_strategies_that_flatten_parameters_are_refused_with_the_way_out():
    stub = type("Trainer", (), {"strategy": FSDPStrategy()})()
    message = r"^MergeCallback cannot work with what FSDPStrategy .* use ModelParallelStrategy\(\)"
    with pytest.raises(RuntimeError, match=message):
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
        MergeCallback("ties", density=0.3).state_key,
        MergeCallback("magmax", exclude=["*.bias"]).state_key,
    }
    assert len(keys) == 5


def test_several_options_of_a_method_go_on_from_one_checkpoint(tmp_path):
    def both():
        return [MergeCallback("ties", density=density) for density in (0.2, 0.3)]

    runner, path = trainer(*(written := both())), tmp_path / "task0.ckpt"
    runner.fit(Plain(), loader(0))
    runner.save_checkpoint(path)
    for callback, other in zip(both(), written, strict=True):
        trainer(callback).test(Plain(), loader(0), ckpt_path=path, verbose=False, **SAFE)
        assert callback.merged() == other.merged()


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    runner, path = trainer(MergeCallback("ties", density=0.3)), tmp_path / "task0.ckpt"
    runner.fit(Plain(), loader(0))
    runner.save_checkpoint(path)
    for other in (MergeCallback(), MergeCallback("ties"), MergeCallback("ties", density=0.4)):
        with pytest.raises(InputError, match="'density': 0.3.*; make it with the saved options"):
            trainer(other).test(Plain(), loader(0), ckpt_path=path, verbose=False, **SAFE)


def test_a_checkpoint_of_before_options_told_callbacks_apart_is_read(tmp_path):
    callback, path = MergeCallback("ties", density=0.3), tmp_path / "task0.ckpt"
    runner = trainer(callback)
    runner.fit(Plain(), loader(0))
    runner.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {
        "MergeCallback{'method': 'ties', 'start': 'sequential'}": checkpoint["callbacks"].pop(
            callback.state_key
        )
    }
    torch.save(checkpoint, path)
    other = MergeCallback("ties", density=0.3)
    trainer(other).test(Plain(), loader(0), ckpt_path=path, verbose=False, **SAFE)
    assert other.merged() == callback.merged()


def test_several_callbacks_merge_what_one_training_changes_and_are_evaluated_one_by_one():
    module, both = Plain(), [MergeCallback("magmax"), MergeCallback("average")]
    alone = Plain(), MergeCallback("average")
    for task in range(2):
        fit(module, both, task)
        fit(*alone, task)
    assert both[1].merged() == alone[1].merged() != both[0].merged()
    before = weights(module)
    trainer(*(MergeCallback(method) for method in ("ties", "average"))).test(module, loader(0))
    assert same(before, module.seen["test"])
    message = (
        "^this Trainer has 2 MergeCallbacks, but an evaluation can see the weights of one only"
    )
    for evaluate in ("test", "validate", "predict"):
        with pytest.raises(InputError, match=message):
            getattr(trainer(*both), evaluate)(module, loader(0))
        assert same(before, weights(module))
    trainer(both[1]).test(module, loader(0), verbose=False)
    both[1].install(module)
    assert same(module.seen["test"], weights(module))


@pytest.mark.parametrize(
    "starts", [("sequential", "independent"), ("merged", "merged"), ("merged", "sequential")]
)
def test_several_callbacks_that_start_tasks_at_different_weights_are_refused(starts):
    methods = "magmax", "average"
    both = [MergeCallback(m, start=start) for m, start in zip(methods, starts, strict=True)]
    message = f"^this Trainer has 2 MergeCallbacks, with start {', '.join(starts)}; expected"
    with pytest.raises(InputError, match=message):
        fit(Plain(), both, 0)


def test_the_merged_weights_go_into_a_module_that_is_frozen_compiled_or_of_less_precision():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    trained = weights(module)
    compiled = torch.compile(module, backend="eager")
    callback.install(compiled)
    merged = weights(module)
    assert not same(merged, trained)
    half = Plain().bfloat16()
    callback.install(half)
    assert same(weights(half), {name: tensor.bfloat16() for name, tensor in merged.items()})
    frozen = Plain().requires_grad_(False)
    callback.install(frozen)
    assert all(torch.equal(frozen.get_parameter(name), value) for name, value in merged.items())


def test_a_module_frozen_since_is_tested_merged_and_gets_its_weights_back():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    trained = weights(module)
    module.requires_grad_(False)
    trainer(callback).test(module, loader(0), verbose=False)
    assert all(torch.equal(module.get_parameter(name), value) for name, value in trained.items())


def test_the_merged_weights_do_not_go_into_another_module():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    message = "^the module has other tensors than that of the tasks; missing: net.0.weight, "
    with pytest.raises(InputError, match=message):
        callback.install(torch.nn.Linear(4, 8))
    other = Plain()
    other.net[0] = torch.nn.Linear(2, 8)
    message = r"^the module has other shapes than in earlier tasks: net.0.weight \(8, 2\) instead"
    before = weights(other)
    with pytest.raises(InputError, match=message):
        callback.install(other)
    assert same(before, weights(other))


def test_a_trainer_that_has_reached_its_last_epoch_trains_nothing_and_says_so(caplog):
    module, callback = Plain(), MergeCallback("magmax")
    loop = trainer(callback)
    loop.fit(module, loader(0))
    assert "nothing was trained" not in caplog.text
    loop.fit(module, loader(1))
    assert callback.tasks == 1
    assert "does not count as a task. Use a new Trainer for each task" in caplog.text
