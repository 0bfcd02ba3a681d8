"""The penalty on the drift of features: its factors and its gradient against loops in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_merge import ZeroShotHead
from cl_merge.benchmarks.studies.drift_penalty import DriftPenalty
from cl_merge.models.classifier import CLIPClassifier


@pytest.fixture
def module():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=4)]
    visual = nn.Sequential(*parts, nn.Flatten(), nn.Linear(4, 5, bias=False))
    return CLIPClassifier(visual, ZeroShotHead(torch.randn(3, 5), ["a", "b", "c"])).double()


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator).double()


def penalty_of(penalty, changes, tasks):
    """λ times tr(B ΔW A ΔWᵀ), summed over layers, with the mean of A over tasks."""
    total = torch.zeros(())
    for name, change in changes.items():
        inner = penalty.gradients[name] @ change @ penalty.inputs[name] / tasks
        total = total + 3.0 * torch.trace(inner @ change.T)
    return total


def test_factors_are_the_second_moments_of_inputs_and_gradients(module):
    penalty = DriftPenalty(module, 3.0, seed=5)
    penalty.remember(module, [images(4)])
    conv, linear = module.visual[0], module.visual[4]
    drawn = torch.randn((4, 5), generator=torch.Generator().manual_seed(5)).double()
    inputs = {name: 0.0 for name in penalty.layers}
    gradients = dict(inputs)
    for image, v in zip(images(4), drawn, strict=True):
        middle = conv(image[None]).detach().requires_grad_(True)
        hidden = module.visual[1:4](middle)
        features = linear(hidden)
        score = (F.normalize(features, dim=-1) * v).sum()
        at_conv, at_linear = torch.autograd.grad(score, (middle, features))
        inputs["visual.4"] += hidden.detach().T @ hidden.detach() / 4
        gradients["visual.4"] += at_linear.T @ at_linear / 4
        padded = F.pad(image, (1, 1, 1, 1))
        for row in range(3):
            for column in range(3):
                patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
                there = at_conv[0, :, row, column]
                inputs["visual.0"] += torch.outer(patch, patch) / 4
                gradients["visual.0"] += torch.outer(there, there) / 4 / 9
    for name in penalty.layers:
        torch.testing.assert_close(penalty.inputs[name], inputs[name])
        torch.testing.assert_close(penalty.gradients[name], gradients[name])


def test_of_one_image_and_a_linear_layer_it_is_the_squared_change_along_v(module):
    penalty = DriftPenalty(module, 3.0, seed=5)
    penalty.remember(module, [images(1)])
    v = torch.randn((1, 5), generator=torch.Generator().manual_seed(5)).double()
    hidden, weight = module.visual[:4](images(1)).detach(), module.visual[4].weight
    change = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    _, moved = torch.func.jvp(
        lambda w: (F.normalize(hidden @ w.T, dim=-1) * v).sum(), (weight,), (change,)
    )
    torch.testing.assert_close(penalty_of(penalty, {"visual.4": change}, tasks=1), 3.0 * moved**2)


def test_the_gradient_is_that_of_the_penalty_since_the_task_began(module):
    penalty = DriftPenalty(module, 3.0, seed=5)
    penalty.on_train_start()
    penalty.on_after_backward()  # the first task trains freely, though nothing has a gradient yet
    for seed in (1, 2):
        penalty.remember(module, [images(4, seed)])
    penalty.on_train_start()
    changes = {}
    for name, layer in penalty.layers.items():
        change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
        layer.weight.data += change
        layer.weight.grad = torch.ones_like(layer.weight)
        changes[name] = change.double().flatten(1).requires_grad_(True)
    penalty_of(penalty, changes, tasks=2).backward()
    penalty.on_after_backward()
    for name, layer in penalty.layers.items():
        expected = 1 + changes[name].grad.view_as(layer.weight)
        torch.testing.assert_close(layer.weight.grad, expected)


def test_only_full_matrices_train_and_no_more_images_are_taken_than_said(module):
    penalty = DriftPenalty(module, 3.0, seed=5)
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        "visual.0.weight",
        "visual.4.weight",
    }
    penalty.remember(module, [images(150), images(150, seed=2)])
    other = DriftPenalty(module, 3.0, seed=5)
    other.remember(module, [torch.cat([images(150), images(150, seed=2)])[:200]])
    for name in penalty.layers:
        assert torch.equal(penalty.inputs[name], other.inputs[name])
