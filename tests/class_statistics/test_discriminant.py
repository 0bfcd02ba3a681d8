"""The discriminant against densities and scikit-learn; leaving out against really leaving out."""

import numpy as np
import pytest
import torch
from feature_vectors import gaussians_of, on_grid
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from cl_merge.class_statistics import (
    Discriminant,
    leave_one_out_scores,
)


def draw(images=60, classes=4, features=6, seed=0):
    """Vectors that are whole multiples of the moments' step, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    means = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, features, generator=generator, dtype=torch.float64)
    vectors = means[labels] + noise * torch.linspace(0.2, 1.5, features)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return on_grid(vectors), labels


@pytest.mark.parametrize("features", [6, 90], ids=["D < N", "D > N"])
def test_scores_are_log_densities_up_to_what_classes_share(features):
    vectors, labels = draw(features=features)
    gaussians = gaussians_of(vectors, labels, 4)
    covariance = gaussians.covariance()[0].numpy()
    scores = Discriminant.of(gaussians).scores(vectors).numpy()
    for vector, score in zip(vectors.numpy(), scores, strict=True):
        apart = [vector - mean for mean in gaussians.means.numpy()]
        density = np.array([-0.5 * a @ np.linalg.solve(covariance, a) for a in apart])
        np.testing.assert_allclose(score - score[0], density - density[0], rtol=0, atol=1e-8)


def test_classes_not_seen_score_minus_infinity_and_others_as_without_them():
    vectors, labels = draw()
    places = torch.tensor([0, 2, 3, 5])
    some = Discriminant.of(gaussians_of(vectors, places[labels], 6))
    alone = Discriminant.of(gaussians_of(vectors, labels, 4))
    scores = some.scores(vectors)
    assert (scores[:, [1, 4]] == -torch.inf).all()
    torch.testing.assert_close(scores[:, places], alone.scores(vectors))


def test_scores_are_those_of_scikit_learn():
    vectors, labels = draw()
    gaussians = gaussians_of(vectors, labels, 4)
    found = Discriminant.of(gaussians)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=found.shrinkage)
    theirs.fit(vectors.numpy(), labels.numpy())
    # Its covariance is a mean over images, ours over degrees of freedom; classes are equally
    # frequent, so that their log frequency is a constant.
    expected = theirs.decision_function(vectors.numpy()) * gaussians.freedom / len(vectors)
    scores = found.scores(vectors).numpy()
    np.testing.assert_allclose(
        scores - scores[:, :1], expected - expected[:, :1], rtol=0, atol=1e-9
    )


def really_left_out(vectors, labels, classes, row):
    """Everything anew without one vector, but for shrinkage, freedom and the identity's size."""
    gaussians = gaussians_of(vectors, labels, classes)
    _, share = gaussians.covariance()
    size = np.trace(gaussians.scatter.numpy()) / gaussians.freedom / vectors.shape[1]
    kept = np.arange(len(vectors)) != row
    rest, of = vectors.numpy()[kept], labels.numpy()[kept]
    covariance = share * size * np.eye(vectors.shape[1])
    means = []
    for label in range(classes):
        means.append(rest[of == label].mean(axis=0))
        apart = rest[of == label] - means[-1]
        covariance += (1 - share) * apart.T @ apart / gaussians.freedom
    inverse = np.linalg.inv(covariance)
    apart = vectors.numpy()[row] - np.stack(means)
    return -0.5 * np.einsum("cd,de,ce->c", apart, inverse, apart)


@pytest.mark.parametrize(("images", "features"), [(60, 6), (8, 6), (24, 40)])
def test_leave_one_out_scores_are_those_of_really_leaving_out(images, features):
    vectors, labels = draw(images, 4, features)
    found = leave_one_out_scores(vectors, labels, gaussians_of(vectors, labels, 4)).numpy()
    for row in range(images):
        expected = really_left_out(vectors, labels, 4, row)
        np.testing.assert_allclose(found[row], expected, rtol=1e-8, atol=1e-8)


def test_rows_are_scored_alike_in_pieces():
    vectors, labels = draw()
    gaussians = gaussians_of(vectors, labels, 4)
    whole = leave_one_out_scores(vectors, labels, gaussians)
    found = leave_one_out_scores(vectors, labels, gaussians, rows_at_once=7)
    torch.testing.assert_close(found, whole)
    assert leave_one_out_scores(vectors[:0], labels[:0], gaussians).shape == (0, 4)


def test_a_class_not_seen_is_left_out_everywhere():
    vectors, labels = draw()
    found = leave_one_out_scores(vectors, labels, gaussians_of(vectors, labels, 5))
    assert (found[:, 4] == -torch.inf).all()
    assert found[:, :4].isfinite().all()


def test_a_vector_that_alone_spans_a_direction_stays_finite():
    """Without shrinkage to speak of: the first axis is varied by one vector only."""
    generator = torch.Generator().manual_seed(0)
    vectors = 0.1 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    vectors[:, 0] = 0.0
    vectors[:2, 0] = torch.tensor([0.5, 0.0])
    labels = torch.arange(4000) % 2
    gaussians = gaussians_of(vectors, labels, 2)
    assert gaussians.covariance()[1] < 0.01
    found = leave_one_out_scores(vectors[:10], labels[:10], gaussians)
    assert found.isfinite().all()
    # To the statistics of all others it is as unlikely as can be.
    assert found[0].max() < found[1:].min()


def test_without_variance_leaving_out_moves_the_mean_only():
    vectors = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1]]
    labels = torch.tensor([0, 0, 1, 1])
    found = leave_one_out_scores(vectors, labels, gaussians_of(vectors, labels, 2))
    assert found.tolist() == [[0.0, -1.0], [0.0, -1.0], [-1.0, 0.0], [-1.0, 0.0]]


def test_one_image_a_class_is_classified_by_the_nearest_mean():
    vectors = torch.eye(2, dtype=torch.float64)
    discriminant = Discriminant.of(gaussians_of(vectors, torch.tensor([0, 1]), 2))
    assert discriminant.shrinkage == 1.0
    assert discriminant.scores(vectors).argmax(dim=1).tolist() == [0, 1]
