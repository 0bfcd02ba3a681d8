"""CLIPClassifier: what trains, the loss, the schedule, and what a test counts."""

import math
import re
from collections import OrderedDict

import lightning as L
import pytest
import torch
from tiny import NAMES, QUIET, classifier, stream
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from cl_merge.errors import InputError
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.zero_shot import ZeroShotHead
from cl_merge.task_vectors.module_weights import trained_parameters


def test_only_the_image_encoder_trains():
    model = classifier()
    assert set(trained_parameters(model)) == {"visual.1.weight", "visual.1.bias"}


def test_the_loss_is_the_cross_entropy_over_the_classes_of_the_task():
    model, data = classifier(), stream(order=[5, 0, 3, 1, 2, 4], batch_size=100)
    data.select(1)
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append((batch, outputs["loss"].item()))

    reference = classifier()
    L.Trainer(**QUIET, max_epochs=1, callbacks=[Record()]).fit(model, datamodule=data)
    (images, labels, _), loss = losses[0]
    assert set(labels.tolist()) == {3, 1}
    features = nn.functional.normalize(reference.visual(images), dim=1)
    logits = features @ reference.head.weight.T
    log_probabilities = logits[:, [3, 1]].log_softmax(dim=1)
    own = torch.tensor([[3, 1].index(label) for label in labels.tolist()])
    expected = -log_probabilities[torch.arange(len(own)), own].mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_stream_it_classifies_among_all_classes():
    model = classifier()
    images, labels = torch.rand(20, 3, 8, 8), torch.randint(0, 6, (20,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    trainer = L.Trainer(**QUIET, max_epochs=1)
    trainer.fit(model, loader, loader)
    logged = trainer.test(model, loader, verbose=False)[0]
    predicted = torch.cat(trainer.predict(model, loader))
    hits = (predicted.argmax(dim=1) == labels).float().mean().item()
    assert logged["test/accuracy"] == pytest.approx(100 * hits)
    assert predicted.shape == (20, 6)


def published_rate(step, lr, warmup, steps):
    """The schedule of the recipe: linear warm-up, then cosine to zero."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize("warmup", [0, 3, 500])
def test_the_rate_warms_up_and_falls_to_zero_anew_for_every_task(warmup):
    model, data = classifier(lr=0.1, warmup_steps=warmup), stream()
    for _ in range(2):
        rates = []

        class Record(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, rates=rates):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        L.Trainer(**QUIET, max_epochs=4, callbacks=[Record()]).fit(model, datamodule=data)
        steps = 4 * 3
        expected = [published_rate(step, 0.1, warmup, steps) for step in range(steps)]
        assert rates == pytest.approx(expected)


class Endless(IterableDataset):
    def __iter__(self):
        yield from [(torch.rand(3, 8, 8), 0)] * 4


@pytest.mark.parametrize(
    ("limits", "loader"),
    [
        ({"max_epochs": -1, "max_time": "00:00:00:00"}, stream().train_dataloader()),
        ({"max_epochs": 1}, DataLoader(Endless())),
    ],
)
def test_only_a_schedule_with_an_end_needs_to_know_it(limits, loader, caplog):
    with caplog.at_level("INFO", "cl_merge"):
        L.Trainer(**QUIET, **limits).fit(classifier(schedule="constant", warmup_steps=2), loader)
    assert "warm-up" not in caplog.text
    with pytest.raises(InputError, match="cosine.*max_epochs.*max_steps.*constant"):
        L.Trainer(**QUIET, **limits).fit(classifier(), loader)


def test_a_task_that_ends_within_the_warm_up_is_told(caplog):
    model = classifier(warmup_steps=500)
    with caplog.at_level("INFO", "cl_merge"):
        for _ in range(2):
            L.Trainer(**QUIET, max_epochs=1).fit(model, datamodule=stream())
    assert caplog.text.count("warm-up") == 1
    assert "a task takes 3 steps and its warm-up 500" in caplog.text
    assert "the learning rate ends at 1 % of its peak" in caplog.text


def test_batch_norm_statistics_stay_frozen_but_its_weights_train():
    visual = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 16))
    model = CLIPClassifier(visual, ZeroShotHead(torch.randn(6, 16), NAMES), lr=0.1, warmup_steps=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    L.Trainer(**QUIET, max_epochs=1).fit(model, datamodule=stream())
    after = model.state_dict()
    assert torch.equal(after["visual.1.running_mean"], before["visual.1.running_mean"])
    assert torch.equal(after["visual.1.running_var"], before["visual.1.running_var"])
    assert not torch.equal(after["visual.1.weight"], before["visual.1.weight"])
    assert not torch.equal(after["visual.3.weight"], before["visual.3.weight"])


def test_one_pass_over_the_test_set_fills_a_row_of_both_matrices():
    model, data = classifier(), stream()
    trainer = L.Trainer(**QUIET)
    data.select(2)
    logged = trainer.test(model, datamodule=data, verbose=False)[0]
    assert list(model.accuracy.rows) == [2]
    images, labels, tasks = (
        torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True)
    )
    with torch.no_grad():
        logits = model(images)
    for task in data.tasks:
        own = tasks == task.index
        agnostic = (logits[own].argmax(1) == labels[own]).double().mean() * 100
        classes = torch.tensor(task.classes)
        aware = (classes[logits[own][:, classes].argmax(1)] == labels[own]).double().mean() * 100
        assert model.accuracy.accuracy()[0, task.index] == pytest.approx(agnostic.item())
        assert model.accuracy.accuracy(aware=True)[0, task.index] == pytest.approx(aware.item())
    overall = (logits.argmax(1) == labels).double().mean() * 100
    assert logged["test/accuracy"] == pytest.approx(overall.item())


class Stop(L.Callback):
    def on_test_batch_end(self, *_):
        raise RuntimeError("stopped")


def test_a_test_that_was_stopped_is_not_counted():
    model, data = classifier(), stream()
    with pytest.raises(RuntimeError, match="stopped"):
        L.Trainer(**QUIET, callbacks=[Stop()]).test(model, datamodule=data)
    L.Trainer(**QUIET).test(model, datamodule=data, verbose=False)
    assert model.accuracy.total.tolist() == [10, 10, 10]


def test_a_test_of_other_data_leaves_the_matrix_of_a_stream_alone():
    model, data, trainer = classifier(), stream(), L.Trainer(**QUIET)
    images, labels, indices = torch.rand(9, 3, 8, 8), torch.zeros(9).long(), torch.arange(9)
    other = DataLoader(TensorDataset(images, labels, indices))
    trainer.test(model, other, verbose=False)
    assert model.accuracy is None
    trainer.test(model, datamodule=data, verbose=False)
    found = model.accuracy.rows[0].clone()
    logged = trainer.test(model, other, verbose=False)[0]
    assert torch.equal(model.accuracy.rows[0], found)
    hits = (model(images).argmax(dim=1) == labels).double().mean()
    assert logged["test/accuracy"] == pytest.approx(100 * hits.item())


def test_other_tasks_have_a_matrix_of_their_own():
    model, trainer = classifier(), L.Trainer(**QUIET)
    trainer.test(model, datamodule=stream(), verbose=False)
    before, other = model.accuracy, stream(order=[0, 2, 4, 1, 3, 5])
    found = trainer.test(model, datamodule=other, verbose=False)
    assert found == trainer.test(classifier(), datamodule=other, verbose=False)
    matrix = model.accuracy
    assert matrix is not before
    trainer.test(model, datamodule=other.joint(), verbose=False)
    assert model.accuracy is matrix
    assert list(matrix.rows) == [0, 2]


def test_a_forward_pass_is_the_head_on_the_features_of_the_encoder():
    model, images = classifier(), torch.rand(5, 3, 8, 8)
    features = model.features(images)
    assert torch.equal(features, model.visual(images))
    assert not torch.allclose(features.norm(dim=1), torch.ones(5), atol=0.01)  # as they come
    for classes in (None, [4, 1]):
        assert torch.equal(model(images, classes), model.head(features, classes))


def test_a_function_may_classify_in_the_place_of_the_head():
    asked = []

    def classify(module, images, features, classes):
        asked.append((module, images, features, classes))
        return 2 * module.head(features, classes)

    model, images = classifier(), torch.rand(5, 3, 8, 8)
    plain = model(images, [4, 1])
    model.classify = classify
    assert torch.equal(model(images, [4, 1]), 2 * plain)
    ((module, seen, features, classes),) = asked
    assert module is model
    assert seen is images
    assert torch.equal(features, model.features(images))
    assert classes == [4, 1]
    trainer = L.Trainer(**QUIET)
    loader = DataLoader(TensorDataset(images, torch.zeros(5, dtype=torch.int64)), batch_size=5)
    (predicted,) = trainer.predict(model, loader)
    assert torch.equal(predicted, 2 * model.head(model.features(images)))
    trainer.test(model, loader, verbose=False)
    assert len(asked) == 3
    assert set(model.state_dict()) == set(classifier().state_dict())


def test_weights_carry_the_names_of_open_clip():
    assert "visual.1.weight" in classifier().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("inf")}, "lr=inf; expected a finite number above 0"),
        ({"lr": 0.0}, "lr=0.0; expected a finite number above 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1; expected 0 or more"),
        (
            {"schedule": "cosinus"},
            "unknown schedule 'cosinus'; did you mean 'cosine'? Known: cosine, constant",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        classifier(**options)


def layered(**options):
    """A classifier whose encoder has a stem, two blocks and a norm behind them."""
    torch.manual_seed(0)
    parts = {
        "flat": nn.Flatten(),
        "stem": nn.Linear(192, 16),
        "blocks": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)),
        "norm": nn.LayerNorm(16),
    }
    head = ZeroShotHead(torch.randn(6, 16), NAMES)
    return CLIPClassifier(nn.Sequential(OrderedDict(parts)), head, **{"lr": 0.01} | options)


def trained_in_groups(model):
    """Train a task; the optimizer's groups, each as learning rate and parameters."""
    groups = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            (optimizer,) = trainer.optimizers
            groups[:] = [(group["lr"], group["params"]) for group in optimizer.param_groups]

    L.Trainer(**QUIET, max_epochs=1, callbacks=[Record()]).fit(model, datamodule=stream())
    return groups


def test_each_layer_learns_at_its_own_rate():
    model = layered(layer_decay=0.5, schedule="constant", warmup_steps=0)
    groups = trained_in_groups(model)
    rates = {id(parameter): lr for lr, parameters in groups for parameter in parameters}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        f"visual.{layer}.{what}": 0.01 * 0.5**below
        for layer, below in (("stem", 3), ("blocks.0", 2), ("blocks.1", 1), ("norm", 0))
        for what in ("weight", "bias")
    }
    assert sum(len(parameters) for _, parameters in groups) == 8


def test_every_layer_follows_the_same_schedule():
    groups = trained_in_groups(layered(layer_decay=0.5, warmup_steps=500))
    first = groups[-1][0]
    assert 0 < first < 0.01
    assert [lr for lr, _ in groups] == pytest.approx([first / 8, first / 4, first / 2, first])


def test_without_a_decay_there_is_one_group_in_the_order_of_the_module():
    model = layered()
    ((_, parameters),) = trained_in_groups(model)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_decay_is_above_0_and_at_most_1(decay):
    message = f"layer_decay={decay}; expected above 0, at most 1"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        classifier(layer_decay=decay)
