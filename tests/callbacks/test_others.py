"""MergeCallback among others that change weights, and in checkpoints."""

import copy

import lightning as L
import pytest
import torch
from growing import Endless, Single
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from plain import SAFE, Plain, fit, loader, same, trainer, weights

from cl_merge import TaskVector, merge
from cl_merge.callbacks import EWC, LwF, MergeCallback
from cl_merge.errors import InputError


class Ema(Callback):
    """A moving average as people write it, which an evaluation sees."""

    def __init__(self):
        self.average, self.kept = None, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = weights(pl_module)
        self.average = self.average or now
        self.average = {n: 0.9 * v + 0.1 * now[n] for n, v in self.average.items()}

    def swap(self, module, values):
        for name, value in values.items():
            module.get_parameter(name).data.copy_(value)

    def on_test_start(self, trainer, pl_module):
        self.kept = weights(pl_module)
        self.swap(pl_module, self.average)

    def on_test_end(self, trainer, pl_module):
        self.swap(pl_module, self.kept)


def test_a_foreign_average_in_front_is_overruled_and_leaves_the_trained_weights():
    module, callback, ema = Plain(), MergeCallback("magmax"), Ema()
    base = weights(module)
    trained = fit(module, [ema, callback], 0)
    trainer(ema, callback).test(module, loader(0), verbose=False)
    assert same(module.seen["test"], TaskVector.between(base, trained).apply_to(base, 0.5))
    assert same(weights(module), trained)


def test_a_foreign_average_behind_is_named_before_it_is_evaluated():
    module, callback, ema = Plain(), MergeCallback("magmax"), Ema()
    trained = fit(module, [callback, ema], 0)
    message = r"^something changed the merged weights during the evaluation: .* Ema can do that; "
    with pytest.raises(InputError, match=message):
        trainer(callback, ema).test(module, loader(0), verbose=False)
    assert "test" not in module.seen
    assert same(weights(module), trained)


def test_what_changes_weights_within_an_evaluation_is_named_when_it_ends():
    class Trains(Plain):
        def on_test_epoch_end(self):
            self.net[0].weight.data.add_(1.0)

    module, callback = Trains(), MergeCallback("magmax")
    trained = fit(module, callback, 0)
    with pytest.raises(InputError, match=r": net.0.weight. Trains can do that; "):
        trainer(callback).test(module, loader(0), verbose=False)
    assert same(weights(module), trained)


@pytest.mark.parametrize("who", ["module", "behind"])
@pytest.mark.parametrize("make", [MergeCallback, lambda: EWC(), lambda: LwF(target="net")])
def test_what_a_fit_leaves_counts_whoever_switches_weights_when_training_ends(who, make):
    def double(module):
        for parameter in module.net.parameters():
            parameter.data.mul_(2.0)

    class Switching(Plain):
        def on_train_end(self):
            if who == "module":
                double(self)

    class Behind(Callback):
        def on_train_end(self, trainer, pl_module):
            if who == "behind":
                double(pl_module)

    module, callback = Switching(), make()
    base = weights(module)
    trained = fit(module, [callback, Behind()], 0)
    if isinstance(callback, MergeCallback):
        assert callback.merged() == TaskVector.between(base, trained)
    elif isinstance(callback, EWC):
        assert same(callback.anchor, trained)
    else:
        assert torch.equal(callback._teacher["0.weight"], trained["net.0.weight"])


def test_a_task_that_starts_where_none_has_ended_is_told():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    with pytest.warns(
        UserWarning, match=r"^task 1 \(the 2nd\) starts at other weights than task 0"
    ):
        fit(Plain(), callback, 1)
    callback.reset()
    assert callback.tasks == 0
    fit(Plain(), callback, 1)
    alone = MergeCallback("magmax")
    fit(Plain(), alone, 1)
    assert callback.merged() == alone.merged()


def test_an_interrupted_task_is_told_and_can_be_merged_by_hand(caplog):
    class Stop(Callback):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    module, callback = Plain(), MergeCallback("magmax")
    base = weights(module)
    with pytest.raises(SystemExit):
        fit(module, [callback, Stop()], 0)
    assert "task 0 (the 1st) was interrupted and is not merged; go on with" in caplog.text
    assert callback.tasks == 0
    callback.stream.end_task()
    assert callback.merged() == TaskVector.between(base, weights(module))


# Checkpoints.


def written(tmp_path, module, callback, task, **options):
    checkpoint = ModelCheckpoint(tmp_path, filename=f"task{task}", **options)
    trainer(callback, checkpoint, max_epochs=2).fit(module, loader(task), loader(9))
    return checkpoint


class Monitored(Plain):
    """The first epoch is the best one."""

    def validation_step(self, batch, batch_idx):
        self.log("worse", float(self.current_epoch))


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_weights_of_a_checkpoint_are_those_of_its_task(tasks, tmp_path):
    module, callback = Monitored(), MergeCallback("magmax")
    base = weights(module)
    if tasks == 2:
        fit(module, callback, 0)
    vectors = [dict(callback.merged())] if tasks == 2 else []
    best = written(tmp_path, module, callback, tasks - 1, monitor="worse").best_model_path
    state = torch.load(best, weights_only=True)["state_dict"]
    tuned = {name: state[name] for name in base}
    merged = merge([*map(TaskVector, vectors), TaskVector.between(base, tuned)])
    expected = merged.apply_to(base, 0.5)
    kept = callback.merged()

    trainer(callback).test(module, loader(0), ckpt_path=best, verbose=False, **SAFE)
    assert same(module.seen["test"], expected)
    assert same(weights(module), tuned)
    assert callback.merged() == kept

    other, fresh = Monitored(), MergeCallback("magmax")
    trainer(fresh).test(other, loader(0), ckpt_path=best, verbose=False, **SAFE)
    assert same(other.seen["test"], expected)
    assert fresh.tasks == tasks
    assert fresh.merged() == merged


def test_the_best_weights_of_a_fit_may_count_instead_of_the_last(tmp_path):
    module, callback = Monitored(), MergeCallback("magmax", weights="best")
    base = weights(module)
    best = written(tmp_path, module, callback, 0, monitor="worse").best_model_path
    state = torch.load(best, weights_only=True)["state_dict"]
    tuned = {name: state[name] for name in base}
    assert callback.merged() == TaskVector.between(base, tuned)
    assert same(weights(module), tuned)


@pytest.mark.parametrize("checkpoints", [[], [ModelCheckpoint()]])
def test_best_weights_without_a_monitor_are_refused_before_the_training(checkpoints):
    module = Plain()
    before = weights(module)
    message = r"^MergeCallback\(weights='best'\) found no best checkpoint; add a"
    with pytest.raises(InputError, match=message):
        fit(module, [MergeCallback(weights="best"), *checkpoints], 0)
    assert same(weights(module), before)


def test_the_best_weights_are_those_of_the_checkpoint_that_monitors(tmp_path):
    module, callback = Monitored(), MergeCallback(weights="best")
    last = ModelCheckpoint(tmp_path / "last")
    best = ModelCheckpoint(tmp_path / "best", monitor="worse")
    trainer(callback, last, best, max_epochs=2).fit(module, loader(0), loader(9))
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert same(weights(module), {name: state[name] for name in weights(module)})
    with pytest.raises(InputError, match="make a new ModelCheckpoint for each task"):
        trainer(callback, best).fit(module, loader(1), loader(9))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("make", [EWC, lambda: LwF(target="net")])
def test_the_best_weights_count_for_callbacks_on_either_side(make, behind, tmp_path):
    module, merge, other = Monitored(), MergeCallback(weights="best"), make()
    callbacks = [merge, other] if behind else [other, merge]
    best = ModelCheckpoint(tmp_path, monitor="worse")
    trainer(*callbacks, best, max_epochs=2).fit(module, loader(0), loader(9))
    if isinstance(other, EWC):
        assert same(other.anchor, weights(module))
    else:
        assert torch.equal(other._teacher["0.weight"], module.net[0].weight)


def test_best_and_last_weights_are_not_merged_in_one_training(tmp_path):
    module, both = Monitored(), [MergeCallback(weights="best"), MergeCallback("ties")]
    before = weights(module)
    message = "^this Trainer has 2 MergeCallbacks, with weights best, last; expected all last, or"
    with pytest.raises(InputError, match=message):
        fit(module, [*both, ModelCheckpoint(tmp_path, monitor="worse")], 0)
    assert same(weights(module), before)


def test_a_checkpoint_that_saves_no_best_weights_is_refused_before_the_training(tmp_path):
    module = Monitored()
    before = weights(module)
    saving = ModelCheckpoint(tmp_path, monitor="worse", save_top_k=0)
    with pytest.raises(InputError, match="save_top_k=0.* saves no best weights for MergeCallback"):
        fit(module, [MergeCallback(weights="best"), saving], 0)
    assert same(weights(module), before)


def test_a_fast_run_for_developers_saves_nothing_and_merges_its_last_weights(tmp_path):
    module, callback = Monitored(), MergeCallback(weights="best")
    best = ModelCheckpoint(tmp_path, monitor="worse")
    trainer(callback, best, fast_dev_run=True).fit(module, loader(0), loader(9))
    assert callback.tasks == 1


def test_checkpoints_of_any_hyperparameters_and_part_of_the_weights_are_read(tmp_path):
    class Part(Monitored):
        def __init__(self, folder):
            super().__init__()
            self.save_hyperparameters()
            self.strict_loading = False

        def state_dict(self, *args, **kwargs):
            whole = super().state_dict(*args, **kwargs)
            return {name: whole[name] for name in whole if name.startswith("net.2")}

    callback = MergeCallback(weights="best")
    written(tmp_path, Part(tmp_path), callback, 0, monitor="worse")
    assert callback.tasks == 1


def test_the_state_may_stay_out_of_checkpoints(tmp_path):
    module, callback = Plain(), MergeCallback("magmax", save_state=False)
    checkpoint = written(tmp_path, module, callback, 0, save_top_k=-1)
    path = checkpoint.best_model_path or next(tmp_path.iterdir())
    assert "MergeCallback" not in str(torch.load(path, weights_only=True)["callbacks"].keys())
    with pytest.raises(InputError, match=r"^MergeCallback\(save_state=False\) cannot resume"):
        trainer(callback).fit(module, loader(1), ckpt_path=path, **SAFE)
    other = copy.deepcopy(module)
    torch.nn.init.zeros_(other.net[0].weight)
    runner = trainer(callback)
    runner.strategy.connect(other)
    runner.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"was written without the state of this MergeCallback"):
        trainer(callback).test(
            module, loader(0), ckpt_path=tmp_path / "other.ckpt", verbose=False, **SAFE
        )


def end_of_task(module, callback, path):
    runner = trainer(callback)
    runner.fit(module, loader(0))
    runner.save_checkpoint(path)


def test_a_scale_that_is_given_holds_for_checkpoints_whose_scale_was_chosen(tmp_path):
    path = tmp_path / "end.ckpt"
    end_of_task(Plain(), MergeCallback(scale="auto", held_out=lambda: loader(1)), path)
    module, given = Plain(), MergeCallback(scale=0.25)
    trainer(given).test(module, loader(0), ckpt_path=path, verbose=False, **SAFE)
    assert given.scale == 0.25
    assert same(module.seen["test"], given.merged().apply_to(given.base, 0.25))


def test_a_checkpoint_of_within_a_task_has_the_scale_that_its_task_got(tmp_path, caplog):
    def make():  # the scale of each task is another
        callback = MergeCallback(scale="auto", held_out=lambda: loader(callback.tasks))
        return callback

    module, callback = Plain(), make()
    for task in range(2):
        best = written(tmp_path, module, callback, task).best_model_path
    assert callback.chosen[0] != callback.chosen[1]
    trainer(callback).test(module, loader(0), verbose=False)
    expected = module.seen["test"]
    trainer(callback).test(module, loader(0), ckpt_path=best, verbose=False, **SAFE)
    assert same(module.seen["test"], expected)
    assert "has not been chosen" not in caplog.text
    trainer(make()).test(Plain(), loader(0), ckpt_path=best, verbose=False, **SAFE)
    assert "the scale of task 1 (the 2nd) has not been chosen yet" in caplog.text


@pytest.mark.parametrize("batches", [0, 1])
def test_a_callback_is_as_before_once_a_checkpoint_was_evaluated(batches, tmp_path):
    module, callback, path = Plain(), MergeCallback("ties", scale=0.25), tmp_path / "end.ckpt"
    end_of_task(module, callback, path)
    fit(module, callback, 1)
    before, base = callback.merged(), callback.base
    evaluation = trainer(callback, limit_test_batches=batches)
    evaluation.test(module, loader(0), ckpt_path=path, verbose=False, **SAFE)
    assert callback.tasks == 2
    assert callback.merged() == before
    assert same(callback.base, base)


@pytest.mark.parametrize(
    ("verb", "make"), [("fit", MergeCallback), ("fit", EWC), ("test", MergeCallback)]
)
def test_a_checkpoint_that_a_callback_is_not_in_is_warned_of(verb, make, tmp_path):
    path = tmp_path / "before.ckpt"
    runner = trainer()
    runner.fit(Plain(), loader(0))
    runner.save_checkpoint(path)
    message = rf"^the checkpoint was written without this {make.__name__}, which knows nothing"
    with pytest.warns(UserWarning, match=message):
        getattr(trainer(make(), max_epochs=2), verb)(Plain(), loader(0), ckpt_path=path, **SAFE)


# Modules that are unlike others.


def test_a_state_dict_that_takes_no_arguments_is_not_asked():
    class Strict(Plain):
        def state_dict(self):
            return super().state_dict()

    module, callback = Strict(batch_norm=True), MergeCallback("magmax", buffers="base")
    fit(module, callback, 0)
    assert set(callback.base_buffers) == {"net.1.running_mean", "net.1.running_var"}


def test_buffers_that_are_not_saved_are_left_alone():
    module, callback = Plain(), MergeCallback("magmax", buffers="base")
    module.register_buffer("seen_so_far", torch.zeros(1), persistent=False)
    fit(module, callback, 0)
    assert not callback.base_buffers


@pytest.mark.slow
def test_a_compiled_part_has_the_names_of_the_plain_one(tmp_path):
    plain, part = Plain(), Plain()
    first, second = MergeCallback(directory=tmp_path / "a"), MergeCallback(directory=tmp_path / "b")
    fit(plain, first, 0)
    fit(part, second, 0)
    part.net = torch.compile(part.net, backend="eager")
    fit(plain, first, 1)
    fit(part, second, 1)
    assert first.merged() == second.merged()
    assert TaskVector.load(tmp_path / "b/task1.safetensors") == TaskVector.load(
        tmp_path / "a/task1.safetensors"
    )
    fresh = Plain()
    second.install(fresh)
    first.install(plain)
    assert same(weights(fresh), weights(plain))


def test_the_merge_is_computed_once_for_all_evaluations_of_methods_that_take_long(monkeypatch):
    module, callback = Plain(), MergeCallback("tsv")
    fit(module, callback, 0)
    counted = []
    items = callback.merger.items
    monkeypatch.setattr(callback.merger, "items", lambda: counted.append(1) or items())
    for _ in range(3):
        trainer(callback).test(module, loader(0), verbose=False)
    assert counted == [1]


# One output, several views, endless data.


def as_float(module, batch):
    return module(batch[0]), (batch[1] > 0).float()


@pytest.mark.parametrize("make", [EWC, lambda: LwF(target="net"), lambda: MergeCallback("fisher")])
def test_one_output_is_refused_where_nobody_said_what_it_is(make):
    module, callback = Single("mse"), make()
    with pytest.raises(InputError, match=r"there is one output; say what they are trained with"):
        fit(module, callback, 0)
    assert callback.tasks == 0


@pytest.mark.parametrize(
    "make",
    [
        EWC,
        lambda: MergeCallback("fisher"),
        lambda: MergeCallback(scale="auto", held_out=lambda: loader(1)),
    ],
)
def test_a_module_without_forward_is_refused_before_the_training(make):
    class Stepwise(Plain):
        forward = L.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    module, callback = Stepwise(), make()
    before = weights(module)
    with pytest.raises(InputError, match=r"has no forward; give .*logits=\.\.\."):
        fit(module, callback, 0)
    assert same(weights(module), before)


def test_early_stopping_is_new_for_each_task():
    stopping, callback, module = EarlyStopping("loss"), MergeCallback(), Plain()
    trainer(callback, stopping).fit(module, loader(0))
    with pytest.raises(InputError, match="^this EarlyStopping has been through the task before"):
        trainer(callback, stopping).fit(module, loader(1))
    assert callback.tasks == 1


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_the_fisher_of_one_output_is_that_of_its_loss(loss):
    module, ewc = Single(loss), EWC(loss=loss, logits=as_float, from_zero=False)
    fit(module, ewc, 0)
    expected = {name: torch.zeros_like(p) for name, p in ewc.anchor.items()}
    for images, labels in loader(0):
        for i in range(len(images)):
            module.zero_grad()
            module.training_step((images[i : i + 1], labels[i : i + 1]), 0).backward()
            for name in expected:
                expected[name] += module.get_parameter(name).grad ** 2 / 24
    for name, value in expected.items():
        torch.testing.assert_close(ewc.fisher[name], value)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_the_distillation_of_one_output_pulls_towards_the_teacher(loss):
    moved = []
    for weight in (0.0, 50.0):
        module, lwf = Single(loss), LwF(weight, target="net", loss=loss)
        fit(module, lwf, 0)
        before = module(next(iter(loader(1)))[0])
        fit(module, lwf, 1)
        moved.append(float((module(next(iter(loader(1)))[0]) - before).abs().mean()))
    assert moved[1] < moved[0]


def test_two_views_of_a_batch_are_distilled_as_one_is():
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return 0.5 * (loss + super().training_step(batch, batch_idx))

    found = []
    for kind in (Plain, Twice):
        module, lwf = kind(), LwF(2.0, target="net")
        for task in range(2):
            fit(module, lwf, task)
        found.append(weights(module))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize("make", [EWC, lambda: MergeCallback("fisher")])
def test_a_loader_without_an_end_is_read_as_long_as_it_was_trained_on(make):
    class Counting(Plain):
        evaluated = 0

        def forward(self, images):
            self.evaluated += len(images) if not self.training else 0
            return super().forward(images)

    module, callback = Counting(), make()
    data = torch.utils.data.DataLoader(Endless(), batch_size=4)
    trainer(callback, max_epochs=-1, max_steps=5).fit(module, data)
    assert callback.tasks == 1
    assert module.evaluated == 4 + 1 + 5 * 4  # the first batch is tried, and one sample of it


def test_a_scale_that_cannot_be_chosen_leaves_the_task_uncounted():
    calls = []

    def held_out():
        calls.append(1)
        if len(calls) == 2:  # when the task has been trained
            raise InputError("the disk is gone")
        return loader(0)

    module, merge = Plain(), MergeCallback(scale="auto", held_out=held_out)
    with pytest.raises(InputError, match="the disk is gone"):
        trainer(merge).fit(module, loader(0))
    assert (merge.tasks, merge.chosen) == (0, [])
    trainer(merge).fit(module, loader(0))
    assert (merge.tasks, len(merge.chosen)) == (1, 1)
