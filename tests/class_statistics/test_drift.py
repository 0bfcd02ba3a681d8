"""Drift compensation against a reference that keeps every vector and moves each one."""

import numpy as np
import pytest
import torch
from feature_vectors import moments_of, on_grid

from cl_merge.class_statistics import DriftCompensation, FeatureMoments

CLASSES, FEATURES = 6, 5


def draw_task(seed, classes, images=80):
    """Base and merged vectors, whole multiples of the moments' step: nothing is rounded."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (images,), generator=generator)]
    base = torch.randn(images, FEATURES, generator=generator, dtype=torch.float64)
    map_ = torch.eye(FEATURES) + 0.3 * torch.randn(FEATURES, FEATURES, generator=generator)
    merged = base @ map_.double() + 0.2 * torch.randn(images, FEATURES, generator=generator)
    return *(on_grid(x / x.norm(dim=1, keepdim=True)) for x in (base, merged)), labels


def compensate(tasks, ridge, hold=0.5):
    """What is under test, and the moments of base features that go with it."""
    before = FeatureMoments(CLASSES, FEATURES)
    drift = DriftCompensation(CLASSES, FEATURES, ridge, hold)
    for base, merged, labels in tasks:
        drift.update(before, moments_of(torch.cat([base, merged], dim=1), labels, CLASSES))
        before.add(moments_of(base, labels, CLASSES))
    return drift, before


def naive(tasks, ridge, hold=0.5):
    """Merged vectors of all tasks, each moved by every later task's correction."""
    weight, bias = np.eye(FEATURES), np.zeros(FEATURES)
    olds = []
    for base, merged, labels in [[x.numpy() for x in task] for task in tasks]:
        # Ridge regression of what the map leaves, with an intercept that is not penalised.
        x = base - base.mean(axis=0)
        rest = merged - base @ weight
        y = rest - rest.mean(axis=0)
        penalty = ridge * x.var(axis=0).mean() * np.eye(FEATURES)
        if olds:
            earlier = np.concatenate([old for old, _, _ in olds])
            penalty += hold * np.cov(earlier.T, bias=True)
        change = np.linalg.inv(x.T @ x + len(x) * penalty) @ x.T @ y
        shift = merged.mean(axis=0) - base.mean(axis=0) @ (weight + change) - bias
        olds = [(b, m + b @ change + shift, of) for b, m, of in olds]
        weight, bias = weight + change, bias + shift
        olds.append((base, merged, labels))
    base, merged, labels = (np.concatenate(parts) for parts in zip(*olds, strict=True))
    return base, merged, labels, weight, bias


def around_means(one, other, labels):
    """Products of what is left around the means of classes, summed vector by vector."""
    found = np.zeros((FEATURES, FEATURES))
    for label in np.unique(labels):
        own = labels == label
        for a, b in zip(one[own], other[own], strict=True):
            found += np.outer(a - one[own].mean(axis=0), b - other[own].mean(axis=0))
    return found


STREAMS = {
    "new classes": [[0, 1], [2, 3], [4]],
    "all classes come back": [[0, 1, 2], [0, 1, 2], [0, 1, 2]],
    "some come back": [[0, 1], [1, 2], [0, 4]],
}


@pytest.mark.parametrize("hold", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [1e-3, 2.0])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_every_old_vector_moves_with_the_map(stream, ridge, hold):
    tasks = [draw_task(seed, classes) for seed, classes in enumerate(stream)]
    drift, before = compensate(tasks, ridge, hold)
    base, merged, labels, weight, bias = naive(tasks, ridge, hold)
    found = drift.gaussians(before.counts)
    for label in range(CLASSES):
        own = merged[labels == label]
        assert found.counts[label] == len(own)
        expected = own.mean(axis=0) if len(own) else np.zeros(FEATURES)
        np.testing.assert_allclose(found.means[label].numpy(), expected, rtol=0, atol=1e-10)
    scatter, cross = around_means(merged, merged, labels), around_means(base, merged, labels)
    np.testing.assert_allclose(found.scatter.numpy(), scatter, rtol=0, atol=1e-9)
    np.testing.assert_allclose(drift.cross.numpy(), cross, rtol=0, atol=1e-9)
    np.testing.assert_allclose(drift.weight.numpy(), weight, rtol=0, atol=1e-10)
    np.testing.assert_allclose(drift.bias.numpy(), bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_what_moves_linearly_is_followed_truly(stream):
    """The merged model is another linear map of base features after every task."""
    tasks = []
    for seed, classes in enumerate(stream):
        base, _, labels = draw_task(seed, classes)
        base = on_grid(base, 2**10)
        generator = torch.Generator().manual_seed(10 + seed)
        map_ = on_grid(0.2 * torch.randn(FEATURES, FEATURES, generator=generator).double(), 2**10)
        tasks.append((base, base @ map_, labels))
    drift, before = compensate(tasks, ridge=1e-9, hold=0.0)
    base, labels = (torch.cat([task[part] for task in tasks]) for part in (0, 2))
    true = (base @ map_).numpy()  # all images under the last model
    found = drift.gaussians(before.counts)
    for label in sorted({label for classes in stream for label in classes}):
        expected = true[labels.numpy() == label].mean(axis=0)
        np.testing.assert_allclose(found.means[label].numpy(), expected, rtol=0, atol=1e-6)
    scatter = around_means(true, true, labels.numpy())
    np.testing.assert_allclose(found.scatter.numpy(), scatter, rtol=0, atol=1e-5)


def test_memory_does_not_depend_on_the_number_of_tasks():
    tasks = [draw_task(seed, [seed % CLASSES]) for seed in range(9)]
    sizes = {
        tuple(tensor.shape for tensor in compensate(tasks[:count], 2.0)[0].tensors().values())
        for count in (0, 1, 9)
    }
    assert len(sizes) == 1


def test_statistics_go_to_tensors_and_back_as_copies_and_go_on_alike():
    tasks = [draw_task(seed, [0, 1]) for seed in range(3)]
    drift, before = compensate(tasks[:2], 2.0)
    found = DriftCompensation(CLASSES, FEATURES, 2.0)
    found.load_tensors(drift.tensors())
    base, merged, labels = tasks[2]
    found.update(before, moments_of(torch.cat([base, merged], dim=1), labels, CLASSES))
    whole = compensate(tasks, 2.0)[0]
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
        assert not torch.equal(tensor, drift.tensors()[name]), name


def test_distributions_given_away_stay_as_they_were():
    first, second = draw_task(0, [0, 1]), draw_task(1, [0, 2])
    drift, before = compensate([first], 2.0)
    given = drift.gaussians(before.counts)
    means, scatter = given.means.clone(), given.scatter.clone()
    drift.update(before, moments_of(torch.cat(second[:2], dim=1), second[2], CLASSES))
    assert torch.equal(given.means, means)
    assert torch.equal(given.scatter, scatter)


def test_an_empty_task_changes_nothing():
    drift, before = compensate([draw_task(0, [0, 1])], 2.0)
    tensors = {name: tensor.clone() for name, tensor in drift.tensors().items()}
    drift.update(before, FeatureMoments(CLASSES, 2 * FEATURES))
    for name, tensor in drift.tensors().items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_single_image_moves_old_classes_but_does_not_turn_them():
    drift, before = compensate([draw_task(0, [0, 1])], 2.0)
    old = drift.gaussians(before.counts)
    base, merged, _ = draw_task(1, [2], images=1)
    predicted = base @ drift.weight + drift.bias
    drift.update(before, moments_of(torch.cat([base, merged], dim=1), torch.tensor([2]), CLASSES))
    torch.testing.assert_close(drift.means[:2], old.means[:2] + (merged - predicted))
    torch.testing.assert_close(drift.means[2:3], merged)
    torch.testing.assert_close(drift.scatter, old.scatter)
