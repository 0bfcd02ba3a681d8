"""ClassStatistics: whose features it takes up, and what an evaluation sees of them."""

import copy
import os
import re
import signal

import pytest
import tiny
import torch
from forked import forked
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from plain import SAFE
from statistics_cases import (
    CLASSES,
    FEATURES,
    PIXELS,
    Exact,
    Normed,
    assert_moments,
    clip,
    images_of,
    learn,
    loader_of,
    same_state,
    trainer_of,
)
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from torchvision.transforms.functional import to_tensor

from cl_merge import fit_stream
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.callbacks.batches import own_samples
from cl_merge.class_statistics import StreamStatistics
from cl_merge.errors import InputError
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.zero_shot import ZeroShotHead
from cl_merge.task_vectors.module_weights import trained_parameters


def logits_of(model, *callbacks, task=0, **options):
    loader = DataLoader(TensorDataset(*images_of(task)), batch_size=8)
    return torch.cat(trainer_of(*callbacks, **options).predict(model, loader))


def all_images():
    return tuple(torch.cat(part) for part in zip(images_of(0), images_of(1), strict=True))


@torch.no_grad()
def features_of(module, images=None):
    return copy.deepcopy(module).eval().features(all_images()[0] if images is None else images)


@pytest.fixture
def taken(monkeypatch):
    """What every task gave to the statistics: base and merged features, and labels."""
    found, learn = [], StreamStatistics.learn

    def spy(self, base, merged, labels, *rest, **options):
        found.append((base, merged, labels))
        learn(self, base, merged, labels, *rest, **options)

    monkeypatch.setattr(StreamStatistics, "learn", spy)
    return found


# Whose features.


def test_images_of_a_stream_are_seen_as_in_a_test_whatever_training_makes_of_them():
    data = tiny.stream(tasks=2, train_transform=lambda image: torch.rand(3, 8, 8))
    model, statistics = tiny.classifier(), ClassStatistics()
    before = copy.deepcopy(model)
    trainer = tiny.QUIET | {"max_epochs": 1}
    callbacks = [MergeCallback(), statistics]
    fit_stream(model, data, callbacks=callbacks, trainer=trainer, evaluate=False)
    rows = tiny.splits()["train"]
    with torch.no_grad():
        features = before.visual(torch.stack([to_tensor(row["image"]) for row in rows]))
    expected = torch.zeros(6, 16).double()
    expected.index_add_(0, torch.tensor(rows["label"]), normalize(features.double()))
    found = statistics.statistics.base
    assert found.counts.tolist() == [12] * 6
    sums = found.sums.double() * 2.0**-20
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beside", [True, False])
def test_base_features_are_made_with_the_buffers_before_any_training(beside):
    model = Normed()
    expected = features_of(model)
    statistics = ClassStatistics("base", classes=CLASSES)
    learn(model, *[MergeCallback(buffers="trained")] * beside, statistics)
    assert not torch.equal(model.encoder[2].running_mean, torch.zeros(8))
    assert_moments(statistics.statistics.gaussians()["base"], expected, all_images()[1])
    if beside:
        assert statistics.state_dict()["base_buffers"] == {}


def test_what_merging_leaves_out_still_has_its_base_value_in_base_features(taken):
    model, merge = Exact(), MergeCallback(exclude=["*.bias"])
    before = features_of(model)
    learn(model, merge, ClassStatistics(), tasks=1)
    merge.install(model)
    images, labels = images_of(0)
    assert len(taken[0][2]) == len(labels)
    assert sorted_rows(taken[0][0]) == sorted_rows(normalize(before[: len(labels)]))
    assert sorted_rows(taken[0][1]) == sorted_rows(normalize(features_of(model, images)))


def sorted_rows(vectors):
    return sorted(map(tuple, vectors.tolist()))


def test_both_features_of_a_pair_are_of_one_image_though_the_loader_shuffles(taken):
    model, merge = Exact(), MergeCallback()
    images, labels = images_of(0)
    before = normalize(features_of(model, images))
    learn(model, merge, ClassStatistics(), tasks=1)
    merge.install(model)
    after = normalize(features_of(model, images))
    assert not torch.allclose(before, after, atol=0.01)
    ((base, merged, found),) = taken
    order = [sorted_rows(before).index(row) for row in map(tuple, base.tolist())]
    assert order != sorted(order)
    sort = sorted(range(len(labels)), key=lambda i: before[i].tolist())
    assert torch.equal(merged, after[sort][order])
    assert torch.equal(found, labels[sort][order])


def test_parameters_that_are_tied_are_replaced_in_both_places():
    class Tied(Exact):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(PIXELS, FEATURES, bias=False)
            self.second.weight = self.encoder.weight

        def features(self, images):
            return self.encoder(images.flatten(1)) + self.second(images.flatten(1)).square()

    model, statistics = Tied(), ClassStatistics("base")
    expected = features_of(model)
    learn(model, MergeCallback(), statistics)
    assert_moments(statistics.statistics.gaussians()["base"], expected, all_images()[1])


def test_recurrent_layers_see_the_base_weights_too():
    class Recurrent(Exact):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cells = nn.LSTM(3, FEATURES, batch_first=True)

        def features(self, images):
            return self.cells(images.reshape(-1, 4, 3))[0][:, -1]

        def training_step(self, batch, _):
            return self.features(batch[0]).sum()

    model, statistics = Recurrent(), ClassStatistics("base")
    expected = features_of(model)
    learn(model, statistics)
    assert not torch.allclose(features_of(model), expected, atol=0.1)
    assert_moments(statistics.statistics.gaussians()["base"], expected, all_images()[1])


def test_images_of_ones_own_take_the_place_of_the_training_data():
    images, labels = all_images()
    statistics = ClassStatistics("base", images=lambda: [(images[:5], labels[:5])])
    learn(Exact(), statistics, tasks=1)
    assert torch.equal(statistics.statistics.base.counts, torch.bincount(labels[:5], minlength=4))


def test_training_on_shuffled_tasks_draws_the_same_with_and_without_statistics():
    def weights(*extra):
        torch.manual_seed(1)
        return trained_parameters(learn(clip(), MergeCallback(), *extra))

    plain, beside = weights(), weights(ClassStatistics())
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


def test_half_precision_counts_every_image_and_sums_whole_numbers():
    found = {}
    for precision in ("bf16-mixed", "32-true"):
        model, merge, statistics = clip(), MergeCallback(), ClassStatistics()
        learn(model, merge, statistics, precision=precision)
        logits = logits_of(model, merge, statistics, precision=precision)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(len(logits)))
        found[precision] = statistics.statistics.base
    half, single = found["bf16-mixed"], found["32-true"]
    assert half.sums.dtype == half.products.dtype == torch.int64
    assert torch.equal(half.counts, single.counts)
    assert not torch.equal(half.sums, single.sums)
    apart = (half.sums - single.sums).abs() * 2.0**-20
    assert float(apart.max()) < 0.01 * float(half.counts.max())


def test_every_process_tells_its_own_samples_from_repeated_ones():
    images = TensorDataset(torch.arange(5))
    for rank, expected in ((0, 3), (1, 2)):
        sampler = DistributedSampler(images, 2, rank)
        own_batches = DataLoader(images, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
        for loader in (DataLoader(images, batch_size=2, sampler=sampler), own_batches):
            trainer = type("Trainer", (), {"train_dataloader": loader, "world_size": 2})
            assert own_samples(trainer) == expected


# Where the base is.


def test_statistics_that_come_later_than_merging_use_the_base_of_the_first_task():
    model, merge = Normed(), MergeCallback(buffers="trained")
    expected = features_of(model, images_of(1)[0])
    learn(model, merge, tasks=1)
    statistics = ClassStatistics("base", classes=CLASSES)
    trainer_of(merge, statistics).fit(model, loader_of(1))
    assert_moments(statistics.statistics.gaussians()["base"], expected, images_of(1)[1])


def test_merging_that_comes_later_than_statistics_leaves_them_their_base():
    model, statistics = Normed(), ClassStatistics("base", classes=CLASSES)
    expected = features_of(model)
    learn(model, statistics, tasks=1)
    trainer_of(MergeCallback(buffers="trained"), statistics).fit(model, loader_of(1))
    assert_moments(statistics.statistics.gaussians()["base"], expected, all_images()[1])


@pytest.mark.parametrize("epoch", [0, 1])
def test_what_begins_to_train_later_has_its_base_from_before_it_moved(epoch):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.encoder.bias.requires_grad = trainer.current_epoch >= epoch

    model, statistics = Exact(), ClassStatistics()
    model.encoder.bias.requires_grad = False
    learn(model, statistics, tasks=1)
    bias = model.encoder.bias.detach().clone()
    trainer_of(statistics, Unfreeze(), max_epochs=2).fit(model, loader_of(1))
    assert torch.equal(statistics.base["encoder.bias"], bias)
    assert not torch.equal(model.encoder.bias, bias)


# What an evaluation sees.


@pytest.mark.parametrize("text", [True, False])
def test_classes_not_seen_keep_the_probability_that_the_text_head_gives_them(text):
    model, merge, statistics = clip(), MergeCallback(), ClassStatistics(text=text)
    learn(model, merge, statistics, tasks=1)
    images, _ = images_of(1)
    found = logits_of(model, merge, statistics, task=1).exp()
    merge.install(model)
    with torch.no_grad():
        plain = model(images).softmax(dim=1)
    torch.testing.assert_close(found[:, 2:], plain[:, 2:])
    assert not torch.allclose(found[:, :2], plain[:, :2], atol=0.01)


@pytest.mark.parametrize("kind", ["both", "aligned"])
def test_some_classes_are_chosen_among_as_without_the_others(kind):
    chosen = {}

    class Ask(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, *_):
            chosen.setdefault("all", []).append(outputs)
            chosen.setdefault("some", []).append(pl_module(batch[0], [2, 0]))

    model, merge, statistics = clip(), MergeCallback(), ClassStatistics(kind)
    learn(model, merge, statistics)
    logits_of(model, merge, statistics, Ask())
    every, some = (torch.cat(chosen[name]) for name in ("all", "some"))
    torch.testing.assert_close(
        some.log_softmax(1), every[:, [2, 0]].log_softmax(1), rtol=1e-3, atol=1e-3
    )


def test_the_scale_that_is_chosen_is_the_one_whose_features_are_taken_up(taken):
    data, model = tiny.stream(tasks=2, held_out=0.25), tiny.classifier()
    merge, statistics = MergeCallback(scale="auto"), ClassStatistics("merged")
    trainer = tiny.QUIET | {"max_epochs": 1}
    fit_stream(model, data, callbacks=[merge, statistics], trainer=trainer, seed=0)
    merge.install(model)
    data.select(1)
    batches = list(data.task_dataloader())
    with torch.no_grad():
        expected = normalize(torch.cat([model.visual(batch.image) for batch in batches]))
    assert len(merge.chosen) == 2
    assert int(statistics.statistics.base.counts.sum()) == sum(len(t.train) for t in data.tasks)
    torch.testing.assert_close(taken[-1][1], expected)


class Asking(Exact):
    """Asks the statistics in each test step; notes where the weights lie that it works with."""

    def __init__(self, statistics):
        super().__init__()
        self.statistics, self.places, self.found = statistics, set(), []

    def features(self, images):
        self.places.add(self.encoder.weight.data_ptr())
        return super().features(images)

    def test_step(self, batch):
        self.found.append(self.statistics.classify(self, batch))


def test_a_module_asks_in_its_test_step_and_nothing_is_made_or_copied_for_a_batch():
    made = []

    class Counting(ClassStatistics):
        def classifier(self, *arguments):
            made.append(super().classifier(*arguments))
            return made[-1]

    merge, statistics = MergeCallback(), Counting()
    model = learn(Asking(statistics), merge, statistics)
    model.places.clear()
    trainer_of(merge, statistics).test(model, loader_of(0, shuffle=False), verbose=False)
    assert len(model.found) == 3
    assert len(made) == 1
    assert model.places == {
        model.encoder.weight.data_ptr(),
        merge.base["encoder.weight"].data_ptr(),
    }
    merge.install(model)
    images, labels = images_of(0)
    by_hand = statistics.classify(model, (images, labels))  # made anew: the other is forgotten
    assert len(made) == 2
    torch.testing.assert_close(torch.cat(model.found), by_hand)


def test_a_classifier_that_was_made_in_an_evaluation_is_of_use_after_it():
    kept = []

    class Keep(Callback):
        def on_predict_start(self, trainer, pl_module):
            kept.append(statistics.classifier(pl_module))

    model, statistics = clip(), ClassStatistics("merged")
    learn(model, statistics, tasks=1)
    logits_of(model, statistics, Keep())
    images, labels = images_of(0)
    logits = kept[0](model, (images, labels), model.features(images))
    nn.functional.cross_entropy(logits, labels).backward()
    assert model.visual.proj.grad.abs().max() > 0


def test_a_batch_of_any_form_is_taken_apart_by_ones_own_function():
    class Named(CLIPClassifier):
        def task_logits(self, batch):
            return super().task_logits((batch["image"], batch["label"]))

        def predict_step(self, batch, _):
            return self(batch["image"])

    def features(module, batch):
        return module.features(batch["image"]), batch["label"]

    plain = clip()
    model = Named(plain.visual, plain.head, lr=0.05, warmup_steps=0)
    images, labels = images_of(0)
    rows = [{"image": i, "label": label} for i, label in zip(images, labels, strict=True)]
    statistics = ClassStatistics(features=features)
    trainer_of(statistics).fit(model, DataLoader(rows, batch_size=8))
    found = torch.cat(trainer_of(statistics).predict(model, DataLoader(rows, batch_size=8)))
    by_hand = statistics.classifier(model)
    with torch.no_grad():
        batch = {"image": images, "label": labels}
        expected = by_hand(model, batch, model.features(images))
    torch.testing.assert_close(found, expected)


def test_statistics_are_put_into_the_weights_of_an_encoder_that_ends_with_a_projection():
    statistics = ClassStatistics("aligned")
    tower = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES))
    model = CLIPClassifier(tower, clip().head, lr=0.01, warmup_steps=0)
    learn(model, statistics, tasks=1)
    logits_of(model, statistics)  # beside the encoder they need no projection
    with pytest.raises(InputError, match=r"^Sequential does not end with a linear projection"):
        statistics.install(model)
    with pytest.raises(InputError, match=r"^Exact has no image encoder 'visual' to install in$"):
        statistics.install(Exact())
    headless = nn.Module()
    headless.visual = tower
    with pytest.raises(InputError, match="but Module has no text head 'head'; use another kind"):
        statistics.install(headless)


# Going on.


def assert_goes_on(make, path, **options):
    """A fit that stopped in each task's middle and went on leaves the bits of one that did not."""

    def fits(stops):
        torch.manual_seed(0)
        model, *callbacks = make()
        for task in range(2):
            saves = ModelCheckpoint(dirpath=path / f"{stops}{task}", save_top_k=-1)
            torch.manual_seed(task)
            loader = loader_of(task, shuffle=False)
            whole = {"max_epochs": 3} | options
            if stops:
                cut = whole | {"max_epochs": 2}
                other, *others = make()
                other.load_state_dict(model.state_dict())
                for old, new in zip(callbacks, others, strict=True):
                    if task:
                        new.load_state_dict(old.state_dict())
                trainer_of(*others, saves, **cut).fit(other, loader)
                # A new process: nothing is left but the file.
                model, *callbacks = make()
                saved = next((path / f"{stops}{task}").glob("epoch=0*.ckpt"))
                trainer_of(*callbacks, **whole).fit(model, loader, ckpt_path=saved, **SAFE)
            else:
                trainer_of(*callbacks, **whole).fit(model, loader)
        return model, callbacks

    (one, first), (two, second) = fits(False), fits(True)
    weights = trained_parameters(one)
    assert all(torch.equal(p, weights[n]) for n, p in trained_parameters(two).items())
    assert second[-1].tasks == 2
    assert same_state(second[-1], first[-1])
    for name in ("base", "base_buffers"):
        kept = getattr(first[-1], name)
        assert all(torch.equal(t, kept[n]) for n, t in getattr(second[-1], name).items())


@pytest.mark.parametrize("beside", [True, False])
def test_a_fit_that_stopped_within_a_task_goes_on_to_the_same_bits(beside, tmp_path):
    def make():
        merging = [MergeCallback("ties", buffers="trained")] if beside else []
        return Normed(), *merging, ClassStatistics(classes=CLASSES)

    assert_goes_on(make, tmp_path)


@pytest.mark.slow
def test_a_stream_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    class Die(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.datamodule.task.index == 1 and trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def work(folder, *extra):
        callbacks = [MergeCallback("ties"), ClassStatistics()]
        result = fit_stream(
            tiny.classifier(),
            tiny.stream(tasks=2),
            callbacks=[*callbacks, *extra],
            trainer=tiny.QUIET | {"max_epochs": 3},
            seed=0,
            directory=folder,
            checkpoint_seconds=0,
        )
        torch.save(callbacks[1].statistics.state_dict(), folder / "statistics.pt")
        return [row.tolist() for row in result.accuracy.rows.values()]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = forked(lambda: work(whole), tmp_path / "said")
    assert forked(lambda: work(killed, Die()), tmp_path / "said") == -signal.SIGKILL
    assert forked(lambda: work(killed), tmp_path / "said") == expected
    one, two = (torch.load(folder / "statistics.pt") for folder in (whole, killed))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    # With nothing left to train, the last state is found again.
    assert forked(lambda: work(killed), tmp_path / "said") == expected


@pytest.mark.parametrize("make", [clip, lambda: Asking(None)])
def test_an_evaluation_of_a_checkpoint_votes_as_it_did_when_it_was_written(make, tmp_path):
    def evaluated(model, callbacks, **options):
        loader = DataLoader(TensorDataset(*images_of(0)), batch_size=8)
        if isinstance(model, Asking):
            model.statistics, model.found = callbacks[1], []
            trainer_of(*callbacks).test(model, loader, verbose=False, **options)
            return torch.cat(model.found)
        return torch.cat(trainer_of(*callbacks).predict(model, loader, **options))

    callbacks = [MergeCallback(), ClassStatistics()]
    model = learn(make(), *callbacks, tasks=1)
    expected = evaluated(model, callbacks)
    trainer = trainer_of(*callbacks)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    # Of the second task, which the statistics take up only when it ends.
    trainer = trainer_of(*callbacks, ModelCheckpoint(dirpath=tmp_path, filename="second"))
    trainer.fit(model, loader_of(1))
    fresh = [MergeCallback(), ClassStatistics()]
    found = evaluated(make(), fresh, ckpt_path=tmp_path / "first.ckpt", **SAFE)
    assert torch.equal(found, expected)
    message = "^the checkpoint was written within a task, of whose images ClassStatistics has no"
    with pytest.raises(InputError, match=message):
        evaluated(make(), fresh, ckpt_path=tmp_path / "second.ckpt", **SAFE)


def test_an_evaluation_of_a_checkpoint_of_before_has_the_statistics_of_then(tmp_path):
    model, callbacks, path = clip(), [MergeCallback(), ClassStatistics()], tmp_path / "first.ckpt"
    learn(model, *callbacks, tasks=1)
    expected = logits_of(model, *callbacks)
    trainer = trainer_of(*callbacks)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    trainer_of(*callbacks).fit(model, loader_of(1))
    now = logits_of(model, *callbacks)
    loader = DataLoader(TensorDataset(*images_of(0)), batch_size=8)
    found = trainer_of(*callbacks).predict(model, loader, ckpt_path=path, **SAFE)
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(logits_of(model, *callbacks), now)
    assert callbacks[1].tasks == 2


def test_a_state_of_before_there_were_options_goes_on_as_it_began():
    callbacks = [MergeCallback(), ClassStatistics(ridge=2.0, hold=0.0, rank=0)]
    model = learn(clip(), *callbacks, tasks=1)
    state = callbacks[1].state_dict()
    del state["options"]
    again = ClassStatistics()
    again.load_state_dict(state)
    for name, tensor in again.statistics.state_dict().items():
        assert torch.equal(tensor, callbacks[1].statistics.state_dict()[name]), name
    assert again.statistics.options == callbacks[1].statistics.options
    callbacks[1] = again
    learn(model, *callbacks, tasks=1)
    assert again.tasks == 2


def test_without_the_merge_callback_that_has_the_base_a_saved_state_is_refused():
    merge, statistics = MergeCallback(), ClassStatistics()
    model = learn(clip(), merge, statistics, tasks=1)
    again = ClassStatistics()
    again.load_state_dict(statistics.state_dict())
    message = r"kept beside a MergeCallback, .*; put that one in front of them again: callbacks="
    with pytest.raises(InputError, match=message):
        again.classify(model, images_of(0))
    with pytest.raises(InputError, match=message):
        logits_of(model, again)
    with pytest.raises(InputError, match=message):
        trainer_of(again).fit(model, loader_of(1))
    assert model.classify is None
    # It can be given.
    again.base, again.base_buffers = merge.base, statistics.base_buffers
    with torch.no_grad():
        found, expected = (s.classify(model, images_of(0)) for s in (again, statistics))
    assert torch.equal(found, expected)


# What is wrong is said, before anything is trained where it can be.


class Trains(Callback):
    def on_train_batch_start(self, *_):
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Normed, {}, "Normed has no text head 'head' that tells how many classes there are; give"),
        (
            Exact,
            {"classes": 3},
            "classes=3, but the text head of Exact has 4; leave classes out",
        ),
        (
            Normed,
            {"kind": "aligned", "classes": 4},
            "statistics of kind 'aligned' change the features that a text head classifies, but "
            "Normed has no text head 'head'; use another kind",
        ),
    ],
)
def test_what_a_module_lacks_is_said_before_it_trains(make, options, message):
    statistics = ClassStatistics(options.pop("kind", "both"), **options)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        trainer_of(statistics, Trains()).fit(make(), loader_of(0))


def test_a_module_of_another_number_of_classes_is_refused():
    statistics, other = ClassStatistics(), Exact()
    learn(Exact(), statistics, tasks=1)
    other.head = ZeroShotHead(torch.randn(5, FEATURES), list("abcde"))
    message = "the class statistics are of 4 classes, but Exact has 5; use a new ClassStatistics"
    with pytest.raises(InputError, match=f"^{message}$"):
        trainer_of(statistics, Trains()).fit(other, loader_of(1))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            lambda m, b: (m.features(b[0])[:, None], b[1]),
            "image features are [8, 1, 6] of torch.float32; expected floating-point numbers "
            "[batch, features]",
        ),
        (
            lambda m, b: (m.features(b[0]), b[1].float()),
            "labels are [8] of torch.float32, beside image features [8, 6]; expected whole numbers "
            "[batch]",
        ),
        (
            lambda m, b: (m.features(b[0]), b[1][:-1]),
            "labels are [7] of torch.int64, beside image features [8, 6]; expected whole numbers "
            "[batch]",
        ),
        (
            lambda m, b: (b[0].flatten(1), b[1]),
            "image features have length 12, but the text head of Exact takes 6; give "
            "ClassStatistics(features=...) those that the head takes",
        ),
        (
            lambda m, b: (m.features(b[0]) * torch.inf, b[1]),
            "image features are NaN or infinite: the model has diverged",
        ),
        (
            lambda m, b: (m.features(b[0]), b[1] + 2),
            "labels from 2 to 4, but the statistics are of 4 classes; expected 0 to 3",
        ),
    ],
)
def test_features_and_labels_that_are_none_are_told(features, message):
    statistics, model = ClassStatistics(features=features), Exact()
    before, (images, labels) = copy.deepcopy(model), images_of(0)
    loader = DataLoader(TensorDataset(images, torch.arange(len(labels)) % 3), batch_size=8)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        trainer_of(statistics).fit(model, loader)
    assert statistics.statistics is None
    assert model.encoder.training
    told_before_it_trains = "[batch" in message
    assert torch.equal(model.encoder.weight, before.encoder.weight) == told_before_it_trains


def test_features_of_another_length_than_before_are_told():
    length = {"now": 6}
    statistics = ClassStatistics(
        classes=CLASSES, features=lambda m, b: (b[0].flatten(1)[:, : length["now"]], b[1])
    )
    model = learn(Normed(), statistics, tasks=1)
    length["now"] = 5
    with pytest.raises(
        InputError, match=r"^image features have length 5, those of earlier tasks 6"
    ):
        trainer_of(statistics).fit(model, loader_of(1))
    assert statistics.tasks == 1


def test_a_batch_that_is_no_pair_is_told():
    class Alone(Exact):
        def training_step(self, batch, _):
            return super().training_step((batch["image"],), 0)

    rows = [{"image": image} for image in images_of(0)[0]]
    message = (
        r"^ClassStatistics cannot tell inputs from targets in a batch of type dict; give ClassSt"
    )
    with pytest.raises(InputError, match=message):
        trainer_of(ClassStatistics()).fit(Alone(), DataLoader(rows, batch_size=8))


def test_no_image_at_all_is_told():
    with pytest.raises(InputError, match=r"^the task has no image to take statistics of$"):
        learn(Exact(), ClassStatistics(images=lambda: []), tasks=1)


def test_two_of_them_in_one_evaluation_are_refused_and_leave_the_head_in_its_place():
    model, merge = clip(), MergeCallback()
    one, two = ClassStatistics("both"), ClassStatistics("base")
    learn(model, merge, one, two, tasks=1)
    trained = copy.deepcopy(trained_parameters(model))
    with pytest.raises(
        InputError, match=r"a second ClassStatistics of this trainer, or a function"
    ):
        logits_of(model, merge, one, two)
    assert model.classify is None
    assert all(torch.equal(p, trained[n]) for n, p in trained_parameters(model).items())
    logits_of(model, merge, two)


def test_a_function_of_ones_own_outlives_fits():
    def own(module, images, features, classes):
        return module.head(features, classes)

    model, statistics = clip(), ClassStatistics()
    model.classify = own
    trainer_of(statistics).fit(model, loader_of(0), loader_of(0, shuffle=False))
    assert model.classify is own


def test_a_failure_while_the_images_are_read_leaves_the_trained_weights():
    def features(module, batch):
        found.append(module.encoder.weight.detach().clone())
        if len(found) > 1:  # the first batch is tried before the training
            raise RuntimeError("stop")
        return module.features(batch[0]), batch[1]

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weight = pl_module.encoder.weight.detach().clone()

    found, model, note = [], Exact(), Note()
    with pytest.raises(RuntimeError, match="^stop$"):
        trainer_of(MergeCallback(), ClassStatistics(features=features), note).fit(
            model, loader_of(0)
        )
    assert not torch.equal(found[1], note.weight)  # it was the merged one
    assert torch.equal(model.encoder.weight, note.weight)


def test_beside_several_merge_callbacks_it_is_refused():
    several = [MergeCallback("magmax"), MergeCallback("average")]
    message = (
        "^ClassStatistics reads the merged weights of one MergeCallback, but this Trainer has 2;"
    )
    with pytest.raises(InputError, match=message):
        learn(clip(), *several, ClassStatistics())
