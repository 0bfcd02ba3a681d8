"""ClassStatistics in the hooks of a trainer, on a tiny classifier with a text head."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from plain import SAFE
from statistics_cases import (
    CLASSES,
    FEATURES,
    PIXELS,
    clip,
    images_of,
    learn,
    loader_of,
    trainer_of,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.callbacks import EWC, ClassStatistics, LwF, MergeCallback
from cl_merge.class_statistics import ClassGaussians, FeatureMoments, Vote, unit
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import trained_parameters


def logits_of(model, *callbacks, task=0):
    loader = DataLoader(TensorDataset(*images_of(task)), batch_size=16)
    return torch.cat(trainer_of(*callbacks).predict(model, loader))


def gaussians_of(features, labels):
    moments = FeatureMoments(CLASSES, FEATURES)
    moments.update(unit(features), labels)
    return ClassGaussians.of(moments)


def test_base_statistics_are_those_of_the_model_before_any_training():
    model = clip()
    with torch.no_grad():
        before = [model.features(images_of(task)[0]) for task in range(2)]
    statistics = ClassStatistics("base")
    learn(model, MergeCallback("magmax"), statistics)
    expected = gaussians_of(torch.cat(before), torch.cat([images_of(t)[1] for t in range(2)]))
    found = statistics.statistics.gaussians()["base"]
    torch.testing.assert_close(found.means, expected.means, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=0, atol=1e-4)


def test_merged_statistics_of_one_task_are_those_of_the_merged_model():
    model, merge, statistics = clip(), MergeCallback("magmax"), ClassStatistics("merged")
    learn(model, merge, statistics, tasks=1)
    merge.install(model)
    with torch.no_grad():
        expected = gaussians_of(model.features(images_of(0)[0]), images_of(0)[1])
    found = statistics.statistics.gaussians()["merged"]
    torch.testing.assert_close(found.means, expected.means, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["both", "base", "merged"])
@pytest.mark.parametrize("text", [True, False])
def test_an_evaluation_shows_the_vote(kind, text):
    model, merge = clip(), MergeCallback("magmax")
    statistics = ClassStatistics(kind, text=text)
    images, _ = images_of(0)
    with torch.no_grad():
        base = model.features(images)
    learn(model, merge, statistics)
    found = logits_of(model, merge, statistics)
    merge.install(model)
    with torch.no_grad():
        merged = model.features(images)
    of = {"base": base, "merged": merged}
    scores = [
        discriminant.scores(unit(of[name]))
        for name, discriminant in statistics.statistics.discriminants().items()
    ]
    vote = statistics.statistics.vote
    assert text or vote == Vote(text=0.0)
    expected = vote.combine(model.head(merged).double(), torch.stack(scores).mean(dim=0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)


def test_aligned_statistics_become_part_of_the_weights():
    model, merge, statistics = clip(), MergeCallback("magmax"), ClassStatistics("aligned")
    learn(model, merge, statistics)
    found = logits_of(model, merge, statistics)
    merge.install(model)
    plain = logits_of(model)
    statistics.install(model)
    installed = logits_of(model)
    torch.testing.assert_close(found, installed, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_only_evaluations_outside_a_fit_vote_and_the_model_is_as_it_was_after_them():
    seen = {}

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            seen[trainer.state.fn] = pl_module.classify is not None

    model, merge, statistics = clip(), MergeCallback("magmax"), ClassStatistics()
    callbacks = [merge, statistics, Watch()]
    for task in range(2):
        trainer = trainer_of(*callbacks)
        trainer.fit(model, loader_of(task), loader_of(task, shuffle=False))
        trainer.validate(model, loader_of(task, shuffle=False), verbose=False)
    assert seen == {"fit": False, "validate": True}
    assert model.classify is None


def test_the_vote_is_gone_after_an_evaluation_that_failed():
    class Fail(Callback):
        def on_predict_batch_end(self, *_):
            raise RuntimeError("stop")

    model, statistics = clip(), ClassStatistics()
    learn(model, statistics)
    with pytest.raises(RuntimeError, match="stop"):
        logits_of(model, statistics, Fail())
    assert model.classify is None


def test_before_a_task_was_learned_nothing_changes():
    model = clip()
    plain = logits_of(model)
    assert torch.equal(logits_of(model, MergeCallback("magmax"), ClassStatistics()), plain)


def test_the_base_is_that_of_the_merge_callback_and_not_copied():
    merge, statistics = MergeCallback("magmax"), ClassStatistics()
    learn(clip(), merge, statistics, tasks=1)
    assert all(statistics.base[name] is merge.base[name] for name in merge.base)
    assert statistics.state_dict()["base"] == {}


def test_alone_it_keeps_its_own_base_and_counts_on_the_trained_weights():
    model, statistics = clip(), ClassStatistics("both")
    before = {n: p.clone() for n, p in trained_parameters(model).items()}
    learn(model, statistics)
    assert all(torch.equal(statistics.base[name], before[name]) for name in before)
    assert statistics.tasks == 2


def test_a_callback_in_front_of_the_merge_callback_is_refused():
    with pytest.raises(InputError, match="ClassStatistics runs before MergeCallback"):
        learn(clip(), ClassStatistics(), MergeCallback("magmax"), tasks=1)


@pytest.mark.parametrize("start", ["sequential", "independent", "merged"])
def test_it_works_beside_regularizers_and_from_any_start(start):
    merge, statistics = MergeCallback("ties", start=start), ClassStatistics()
    regularizers = LwF(target="visual"), EWC("empirical")
    learn(clip(), *regularizers, merge, statistics, gradient_clip_val=1.0)
    assert statistics.tasks == merge.tasks == 2
    assert int(statistics.statistics.base.counts.sum()) == 42


def test_memory_does_not_grow_with_tasks():
    merge, statistics = MergeCallback("magmax"), ClassStatistics()
    model, sizes = clip(), []
    for task in (0, 1, 0, 1):
        trainer_of(merge, statistics).fit(model, loader_of(task))
        state = statistics.state_dict()["statistics"]
        sizes.append(sum(tensor.numel() for tensor in state.values()))
    assert len(set(sizes)) == 1


def test_statistics_go_on_from_a_checkpoint(tmp_path):
    def callbacks():
        return [MergeCallback("magmax"), ClassStatistics()]

    torch.manual_seed(0)
    whole = callbacks()
    model = learn(clip(), *whole, tasks=1)
    trainer = trainer_of(*whole)
    trainer.fit(model, loader_of(1, shuffle=False))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, other = callbacks(), clip()
    trainer_of(*again).fit(
        other, loader_of(1, shuffle=False), ckpt_path=tmp_path / "end.ckpt", **SAFE
    )
    found, expected = again[1].statistics, whole[1].statistics
    assert found.tasks == expected.tasks
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in found.state_dict().items())


def test_a_state_of_another_kind_is_refused():
    statistics = ClassStatistics("both")
    learn(clip(), statistics, tasks=1)
    with pytest.raises(InputError, match="of kind 'both', not 'base'"):
        ClassStatistics("base").load_state_dict(statistics.state_dict())


class Plain(L.LightningModule):
    """A module of one's own, with no text head."""

    def __init__(self):
        super().__init__()
        self.net, self.last = nn.Linear(PIXELS, 5), nn.Linear(5, CLASSES)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.last(self.net(images.flatten(1))), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def hidden(module, batch):
    return module.net(batch[0].flatten(1)), batch[1]


def test_any_module_that_gives_features_can_use_it():
    torch.manual_seed(0)
    model, merge = Plain(), MergeCallback("magmax")
    statistics = ClassStatistics("both", features=hidden, classes=CLASSES)
    for task in range(2):
        trainer_of(merge, statistics).fit(model, loader_of(task, count=200))
    merge.install(model)
    hits = []
    for task in range(2):
        images, labels = images_of(task, count=200)
        with torch.no_grad():
            logits = statistics.classify(model, (images, labels))
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(len(labels)))
        hits.append((logits.argmax(dim=1) == labels).float().mean())
    assert min(hits) > 0.9  # four well separated classes, of two tasks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Plain has no method features\(images\); give ClassStatistics\(features=...\)"),
        ({"features": hidden}, r"Plain has no text head 'head' .* give ClassStatistics\(classes="),
        ({"features": hidden, "classes": 2}, "labels from 2 to 3, but the statistics are of 2"),
    ],
)
def test_what_a_module_lacks_is_said(options, message):
    with pytest.raises(InputError, match=message):
        trainer_of(ClassStatistics(**options)).fit(Plain(), loader_of(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassStatistics("aligne"), "unknown kind of class statistics 'aligne'; did you"),
        (lambda: ClassStatistics(ridge=-1.0), "ridge=-1.0; expected a finite number above 0"),
        (lambda: ClassStatistics(classes=0), "classes=0; expected 1 or more"),
        (lambda: ClassStatistics().install(clip()), "of kind 'both' are not part of the"),
        (lambda: ClassStatistics("aligned").install(clip()), "no task has been trained yet"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
