"""Distributions of classes against numpy, and shrinkage against the published formula."""

import numpy as np
import pytest
import torch
from feature_vectors import gaussians_of, on_grid
from sklearn.covariance import OAS

from cl_merge.class_statistics import ClassGaussians, FeatureMoments, oas_shrinkage


def draw(images, classes, features, seed=0):
    """Vectors that are whole multiples of the moments' step, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(images, features, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    labels = torch.randint(classes, (images,), generator=generator)
    return on_grid(vectors), labels


@pytest.mark.parametrize("features", [4, 80], ids=["D < N", "D > N"])
def test_means_and_scatter_are_those_of_numpy(features):
    vectors, labels = draw(40, 5, features)
    labels[labels == 3] = 1  # class 3 is not seen
    found = gaussians_of(vectors, labels, 5)
    scatter = np.zeros((features, features))
    for label in range(5):
        own = vectors[labels == label].numpy()
        assert found.counts[label] == len(own)
        assert bool(found.seen[label]) == (label != 3)
        mean = own.mean(axis=0) if len(own) else np.zeros(features)
        np.testing.assert_allclose(found.means[label].numpy(), mean, rtol=0, atol=1e-14)
        if len(own):
            scatter += len(own) * np.cov(own.T, bias=True)
    np.testing.assert_allclose(found.scatter.numpy(), scatter, rtol=0, atol=1e-12)
    assert found.freedom == 40 - 4


@pytest.mark.parametrize("features", [4, 80], ids=["D < N", "D > N"])
def test_the_covariance_is_shrunk_and_can_be_inverted(features):
    vectors, labels = draw(40, 5, features)
    found = gaussians_of(vectors, labels, 5)
    covariance, share = found.covariance()
    sample = found.scatter / (40 - 5)
    size = np.trace(sample.numpy()) / features
    expected = (1 - share) * sample.numpy() + share * size * np.eye(features)
    np.testing.assert_allclose(covariance.numpy(), expected, rtol=0, atol=1e-14)
    assert 0 < share <= 1
    assert np.linalg.eigvalsh(covariance.numpy()).min() >= 0.99 * share * size


@pytest.mark.parametrize("copies", [1, 3], ids=["one image a class", "the same image thrice"])
def test_without_variance_within_classes_the_covariance_is_the_identity(copies):
    vectors, _ = draw(4, 4, 6)
    vectors, labels = vectors.repeat(copies, 1), torch.arange(4).repeat(copies)
    found = gaussians_of(vectors, labels, 5)
    assert found.freedom == max(1, 4 * copies - 4)
    covariance, share = found.covariance()
    assert torch.equal(covariance, torch.eye(6, dtype=torch.float64))
    assert share == 1.0


def test_a_scatter_of_rounding_errors_is_no_variance():
    """As drift compensation has it: its scatter is a float that went through sums."""
    noise = 1e-17 * torch.eye(3, dtype=torch.float64)
    found = ClassGaussians(torch.tensor([4.0]), torch.ones(1, 3).double(), noise)
    assert torch.equal(found.covariance()[0], torch.eye(3, dtype=torch.float64))


def test_no_image_at_all_is_no_division_by_zero():
    found = ClassGaussians.of(FeatureMoments(2, 3))
    assert not found.seen.any()
    assert found.freedom == 1
    mean, second = found.second_moment()
    assert mean.tolist() == [0.0] * 3
    assert second.tolist() == [[0.0] * 3] * 3


def test_the_second_moment_is_that_of_all_vectors():
    vectors, labels = draw(40, 5, 6)
    mean, second = gaussians_of(vectors, labels, 5).second_moment()
    np.testing.assert_allclose(mean.numpy(), vectors.numpy().mean(axis=0), rtol=0, atol=1e-14)
    expected = sum(np.outer(vector, vector) for vector in vectors.numpy()) / 40
    np.testing.assert_allclose(second.numpy(), expected, rtol=0, atol=1e-13)


def published(sample, freedom):
    """Equation 23 of Chen et al. 2010, transcribed in numpy."""
    p, trace, trace_of_square = len(sample), np.trace(sample), np.trace(sample @ sample)
    numerator = (1 - 2 / p) * trace_of_square + trace**2
    denominator = (freedom + 1 - 2 / p) * (trace_of_square - trace**2 / p)
    return min(numerator / denominator, 1.0)


@pytest.mark.parametrize(("images", "features"), [(200, 5), (30, 5), (30, 90)])
def test_shrinkage_is_the_published_formula(images, features):
    rows = np.random.default_rng(0).normal(size=(images, features)) * np.arange(1, features + 1)
    sample = rows.T @ rows / images
    found = oas_shrinkage(torch.from_numpy(sample), images)
    assert found == pytest.approx(published(sample, images), rel=1e-12)
    assert 0 < found < 1
    # scikit-learn leaves the terms 2 / p out, which matters little for many features.
    theirs = OAS(assume_centered=True).fit(rows).shrinkage_
    assert found == pytest.approx(theirs, rel=2 / features)


def test_shrinkage_of_a_round_covariance_and_of_one_feature_is_whole():
    assert oas_shrinkage(torch.eye(4, dtype=torch.float64), 10) == 1.0
    assert oas_shrinkage(torch.full((1, 1), 0.3, dtype=torch.float64), 10) == 1.0
