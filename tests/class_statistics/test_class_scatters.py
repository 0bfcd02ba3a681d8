"""A covariance for each class against densities, truncation, and really leaving out."""

import numpy as np
import pytest
import torch
from feature_vectors import gaussians_of, on_grid

from cl_merge.class_statistics import ClassScatters, QuadraticDiscriminant

CLASSES = 4


def draw(images, features, seed=0):
    """Vectors that are whole multiples of the moments' step, each class with its own covariance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    means = torch.randn(CLASSES, features, generator=generator, dtype=torch.float64)
    turns = torch.randn(CLASSES, features, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, 1, features, generator=generator, dtype=torch.float64)
    vectors = means[labels] + 0.3 * (noise @ turns[labels])[:, 0]
    return on_grid(vectors / vectors.norm(dim=1, keepdim=True)), labels


def learned(tasks, rank, classes=CLASSES):
    """What is under test after some tasks of vectors and labels, and the distributions."""
    scatters = ClassScatters(classes, tasks[0][0].shape[1], rank)
    for index in range(len(tasks)):
        vectors, labels = tasks[index]
        parts = [torch.cat(parts) for parts in zip(*tasks[: index + 1], strict=True)]
        shared = gaussians_of(*parts, classes).covariance()[0]
        before = gaussians_of(*(part[: len(part) - len(labels)] for part in parts), classes)
        for label in labels.unique().tolist():
            own = vectors[labels == label]
            one = gaussians_of(own, torch.zeros(len(own), dtype=torch.int64), 1)
            scatters.update(label, one, before, shared)
    return scatters, gaussians_of(*parts, classes)


def naive_scores(vectors, means, scatters, counts, shared):
    """Log densities up to the same constant for all, class by class, in float64."""
    size = len(shared)
    found = np.empty((len(vectors), len(means)))
    for label, (mean, scatter, count) in enumerate(zip(means, scatters, counts, strict=True)):
        covariance = (4 * size * shared + scatter) / (4 * size + count - 1)
        apart = vectors - mean
        distance = np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart)
        found[:, label] = -0.5 * distance - 0.5 * np.linalg.slogdet(covariance)[1]
    return found


def naive_scatter(vectors):
    apart = vectors - vectors.mean(axis=0)
    return apart.T @ apart


def own_scatters(vectors, labels):
    return [naive_scatter(vectors[labels == label]) for label in range(CLASSES)]


@pytest.mark.parametrize(("images", "features"), [(200, 6), (24, 12)], ids=["D < n", "D > n"])
def test_scores_are_log_densities_of_a_covariance_for_each_class(images, features):
    vectors, labels = draw(images, features)
    scatters, gaussians = learned([(vectors, labels)], rank=features)
    found = QuadraticDiscriminant(gaussians, scatters).scores(vectors).numpy()
    shared, numbers = gaussians.covariance()[0].numpy(), gaussians.counts.numpy()
    own = own_scatters(vectors.numpy(), labels.numpy())
    expected = naive_scores(vectors.numpy(), gaussians.means.numpy(), own, numbers, shared)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    # They are not those of one covariance for all.
    linear = naive_scores(
        vectors.numpy(), gaussians.means.numpy(), [shared * 0] * CLASSES, [1] * CLASSES, shared
    )
    assert np.abs(linear - found).max() > 0.1


def test_fewer_directions_are_the_strongest_and_keep_the_size_of_the_rest():
    vectors, labels = draw(200, 8)
    scatters, gaussians = learned([(vectors, labels)], rank=3)
    shared = gaussians.covariance()[0]
    root = torch.linalg.inv(torch.linalg.cholesky(shared)).numpy()
    for label, scatter in enumerate(own_scatters(vectors.numpy(), labels.numpy())):
        values, turned = np.linalg.eigh(root @ scatter @ root.T)
        values[:5] = values[:5].mean()
        expected = np.linalg.inv(root) @ (turned * values) @ turned.T @ np.linalg.inv(root).T
        found = scatters.scatter(label, shared).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_class_that_comes_back_has_the_scatter_of_all_its_images():
    first, second = draw(80, 6), draw(120, 6, seed=1)
    scatters, gaussians = learned([first, second], rank=6)
    vectors, labels = (torch.cat(parts).numpy() for parts in zip(first, second, strict=True))
    for label, expected in enumerate(own_scatters(vectors, labels)):
        found = scatters.scatter(label, gaussians.covariance()[0]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # In fewer directions what it varies in altogether is still there.
    few, _ = learned([first, second], rank=2)
    found = few.scatter(0, gaussians.covariance()[0])
    assert abs(float(found.trace()) / np.trace(own_scatters(vectors, labels)[0]) - 1) < 0.2


@pytest.mark.parametrize(("images", "features"), [(60, 6), (8, 6), (24, 40)])
def test_leave_one_out_scores_are_those_of_really_leaving_out(images, features):
    vectors, labels = draw(images, features)
    scatters, gaussians = learned([(vectors, labels)], rank=features)
    found = QuadraticDiscriminant(gaussians, scatters).leave_one_out_scores(vectors, labels)
    shared = gaussians.covariance()[0].numpy()
    for row in range(images):
        kept = np.arange(images) != row
        rest, of = vectors.numpy()[kept], labels.numpy()[kept]
        means = [rest[of == label].mean(axis=0) for label in range(CLASSES)]
        numbers = [(of == label).sum() for label in range(CLASSES)]
        one = vectors.numpy()[row : row + 1]
        expected = naive_scores(one, means, own_scatters(rest, of), numbers, shared)
        np.testing.assert_allclose(found[row : row + 1].numpy(), expected, rtol=1e-5, atol=1e-4)


def test_without_images_of_its_own_a_class_has_the_shared_covariance_or_no_score():
    vectors, labels = draw(60, 6)
    vectors, labels = torch.cat([vectors, vectors[:1]]), torch.cat([labels, torch.tensor([4])])
    scatters, gaussians = learned([(vectors, labels)], rank=6, classes=6)
    assert not scatters.scatter(4, gaussians.covariance()[0]).any()
    discriminant = QuadraticDiscriminant(gaussians, scatters)
    scores = discriminant.scores(vectors)
    assert (scores[:, 5] == -torch.inf).all()
    assert scores[:, :5].isfinite().all()
    left_out = discriminant.leave_one_out_scores(vectors[:60], labels[:60])
    assert torch.equal(left_out[:, 5], scores[:60, 5])


def test_float32_is_as_good_as_float64():
    vectors, labels = draw(200, 64)
    scatters, gaussians = learned([(vectors, labels)], rank=16)
    exact, single = (QuadraticDiscriminant(gaussians, scatters) for _ in range(2))
    apart = single.float().scores(vectors).double() - exact.scores(vectors)
    assert apart.abs().max() < 1e-3


def test_a_score_changes_by_no_more_than_its_steepness():
    vectors, labels = draw(200, 8)
    scatters, gaussians = learned([(vectors, labels)], rank=4)
    discriminant = QuadraticDiscriminant(gaussians, scatters)
    inputs = gaussians.means.clone().requires_grad_()
    for label in range(CLASSES):
        (slope,) = torch.autograd.grad(discriminant.scores(inputs)[:, label].sum(), inputs)
        assert slope.norm(dim=1).max() <= discriminant.steepness


def test_what_was_given_away_stays_as_it_was():
    first, second = draw(80, 6), draw(120, 6, seed=1)
    scatters, gaussians = learned([first], rank=6)
    given = scatters.tensors()
    kept = {name: tensor.clone() for name, tensor in given.items()}
    one = gaussians_of(second[0], torch.zeros(120, dtype=torch.int64), 1)
    scatters.update(0, one, gaussians, gaussians.covariance()[0])
    for name, tensor in given.items():
        assert torch.equal(tensor, kept[name]), name
