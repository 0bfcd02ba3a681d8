"""DriftPenalty: the gradient that it adds, what it keeps, and what it does to a stream."""

import copy

import pytest
import torch
from growing import Backbone, grow
from plain import Plain, fit, loader, same, weights
from tiny import QUIET, classifier, stream
from torch import nn

from cl_merge import fit_stream
from cl_merge.callbacks import DriftPenalty
from cl_merge.callbacks.feature_drift import FeatureDrift
from cl_merge.callbacks.second_moments import SecondMoments
from cl_merge.errors import InputError


def features(module, batch):
    return module.net(batch[0])


def penalty(**options):
    return DriftPenalty(**{"weight": 3.0, "features": features} | options)


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def square(size, seed):
    root = random((size, size), seed)
    return root @ root.T


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.linear = nn.Linear(4, 3, bias=False)


def moments(seed):
    return SecondMoments(
        {"conv.weight": square(8, seed), "linear.weight": square(4, seed + 1)},
        {"conv.weight": square(3, seed + 2), "linear.weight": square(3, seed + 3)},
        {"conv.bias": random(3, seed + 4).square()},
    )


def drift_of(tasks, changes):
    """The drift as the formula has it, with a graph."""
    a = {name: sum(t.inputs[name] for t in tasks) / len(tasks) for name in tasks[0].inputs}
    b = {name: sum(t.gradients[name] for t in tasks) for name in a}
    matrices = {name: changes[name].flatten(1) for name in a}
    total = sum(torch.trace(b[n] @ w @ a[n] @ w.T) for n, w in matrices.items())
    d = sum(t.elements["conv.bias"] for t in tasks)
    return total + (d * changes["conv.bias"] ** 2).sum()


@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_is_that_of_the_formula(count):
    module, drift = Mixed().double(), FeatureDrift()
    tasks = [moments(10 * task) for task in range(count)]
    for task in tasks:
        drift.end_task(copy.deepcopy(task))
    drift.start(module)
    assert float(drift.add_gradients(module, 3.0)) == 0
    changes = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        changes[name] = random(parameter.shape, number).requires_grad_(True)
        parameter.data += changes[name].detach()
        parameter.grad = torch.ones_like(parameter)
    expected = drift_of(tasks, changes)
    (3.0 * expected).backward()
    torch.testing.assert_close(drift.add_gradients(module, 3.0), expected.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, 1 + changes[name].grad)


def test_parameters_that_grow_are_held_where_they_were():
    module, drift = Mixed().double(), FeatureDrift()
    drift.end_task(moments(0))
    module.linear = nn.Linear(6, 5, bias=False).double()
    module.conv = nn.Conv2d(4, 3, 2).double()
    drift.start(module)
    changes = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        full = random(parameter.shape, number)
        former = {"linear.weight": (3, 4), "conv.weight": (3, 2)}.get(name, (3,))
        changes[name] = full[tuple(slice(n) for n in former)].clone().requires_grad_(True)
        parameter.data += full
        parameter.grad = torch.zeros_like(parameter)
    drift_of([moments(0)], changes).backward()
    drift.add_gradients(module, 1.0)
    for name, parameter in module.named_parameters():
        expected = torch.zeros_like(parameter)
        own = changes[name]
        expected[tuple(slice(n) for n in own.shape)] = own.grad
        torch.testing.assert_close(parameter.grad, expected)


def test_the_first_task_is_free_and_later_ones_stay_closer():
    plain, held = Plain(), Plain()
    callback = penalty(weight=100.0)
    assert same(fit(plain, [], 0), fit(held, callback, 0))
    images = loader(0).dataset.tensors[0]
    with torch.no_grad():
        before = nn.functional.normalize(plain(images), dim=1)
        fit(plain, [], 1, max_epochs=4)
        fit(held, callback, 1, max_epochs=4)
        moved = [nn.functional.normalize(m(images), dim=1) - before for m in (plain, held)]
    assert moved[1].square().mean() < 0.5 * moved[0].square().mean()
    assert callback.tasks == 2


def test_what_the_features_do_not_depend_on_is_free():
    module, callback = Backbone(), penalty(features=lambda module, batch: module.backbone(batch[0]))
    fit(module, callback, 0)
    assert set(callback.penalty.inputs) == {"backbone.0.weight"}
    assert set(callback.penalty.elements) == {"backbone.0.bias"}


def test_a_layer_that_is_frozen_for_a_task_is_held_by_all_tasks_when_it_trains_again():
    module, callback = Plain(), penalty()
    for task, trains in enumerate((True, False, True)):
        module.net[0].weight.requires_grad_(trains)
        fit(module, callback, task)
    assert callback.penalty.counts == {"net.0.weight": 3, "net.2.weight": 3}


def test_a_head_that_grows():
    module, callback = Plain(), penalty()
    fit(module, callback, 0)
    before = callback.penalty.gradients["net.2.weight"]
    grow(module, 5)
    fit(module, callback, 1)
    assert before.shape == (3, 3)
    assert callback.penalty.gradients["net.2.weight"].shape == (5, 5)


def test_the_clip_classifier_needs_no_hint_and_a_seed_gives_the_same_bits():
    def run(seed):
        model, callback = classifier(), DriftPenalty(seed=seed)
        fit_stream(model, stream(), callbacks=[callback], trainer=QUIET | {"max_epochs": 1}, seed=0)
        return weights(model)

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


def test_moments_of_a_limited_number_of_images():
    module, callback = Plain(), penalty(samples=5)
    fit(module, callback, 0)
    images = loader(0).dataset.tensors[0][:5]
    torch.testing.assert_close(callback.penalty.inputs["net.0.weight"], images.T @ images / 5)


def test_a_module_without_features_is_refused_before_it_trains():
    module = Plain()
    before = weights(module)
    message = r"Plain has no method features\(images\); give DriftPenalty\(features=...\), a func"
    with pytest.raises(InputError, match=message):
        fit(module, DriftPenalty(), 0)
    assert same(weights(module), before)


def test_bad_options_are_named():
    with pytest.raises(InputError, match="samples=0 of DriftPenalty; expected 1 or more"):
        DriftPenalty(samples=0)
    with pytest.raises(InputError, match="weight=-1.0 of DriftPenalty; expected 0 or more, fin"):
        DriftPenalty(-1.0)


def test_features_without_a_gradient_are_refused_before_the_first_step():
    module = Plain()
    before = weights(module)
    callback = penalty(features=lambda module, batch: module.net(batch[0]).detach())
    with pytest.raises(InputError, match="features have no gradient by any parameter"):
        fit(module, callback, 0)
    assert same(weights(module), before)


def test_a_task_that_changes_no_features_leaves_nothing_to_hold():
    module, callback = Backbone(), penalty(features=lambda module, batch: module.backbone(batch[0]))
    module.backbone.requires_grad_(False)
    fit(module, callback, 0)
    assert callback.tasks == 1
    assert not callback.penalty.inputs
    module.backbone.requires_grad_(True)
    fit(module, callback, 1)
    assert callback.penalty.counts == {"backbone.0.weight": 1}
