"""Moments against naive sums, and that they are exact."""

import copy
import math

import pytest
import torch
from feature_vectors import moments_of

from cl_merge.class_statistics import FeatureMoments, unit
from cl_merge.class_statistics.moments import MOST_ROWS, ROWS_AT_ONCE, STEP
from cl_merge.errors import InputError


def draw(images, classes=5, features=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(images, features, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True), labels


def assert_same_bits(one, other):
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("batch", [1, 7, 400])
def test_any_order_and_any_batches_give_the_same_bits(batch):
    vectors, labels = draw(400)
    found = FeatureMoments(5, 7)
    for rows in torch.randperm(400).split(batch):
        found.update(vectors[rows], labels[rows])
    assert_same_bits(found, moments_of(vectors, labels, 5))


def test_what_two_machines_have_seen_adds_up_to_the_same_bits_in_any_order():
    vectors, labels = draw(400)
    parts = [moments_of(vectors[rank::3], labels[rank::3], 5) for rank in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        found = FeatureMoments(5, 7)
        for rank in order:
            found.add(parts[rank])
        assert_same_bits(found, moments_of(vectors, labels, 5))


def test_processes_reduce_to_the_same_bits():
    vectors, labels = draw(400)
    parts = [moments_of(vectors[rank::2], labels[rank::2], 5) for rank in range(2)]
    others = iter(parts[1].tensors().values())
    parts[0].reduce(lambda tensor: tensor + next(others))
    assert_same_bits(parts[0], moments_of(vectors, labels, 5))


def test_batches_longer_than_what_is_multiplied_at_once_lose_nothing():
    vectors, labels = draw(2 * ROWS_AT_ONCE + 5, features=3)
    whole = (vectors * 2**20).round().long()
    found = moments_of(vectors, labels, 5)
    assert torch.equal(found.products, whole.T @ whole)  # int64 throughout
    for label in range(5):
        assert torch.equal(found.sums[label], whole[labels == label].sum(dim=0))
        assert found.counts[label] == (labels == label).sum()


def test_moments_are_the_naive_sums_to_the_rounding_step():
    vectors, labels = draw(50)
    found = moments_of(vectors, labels, 5)
    sums, products = torch.zeros(5, 7).double(), torch.zeros(7, 7).double()
    for vector, label in zip(vectors, labels, strict=True):
        sums[label] += vector
        products += torch.outer(vector, vector)
    # Each element is off by half a step at most, each product by two of them times at most 1.
    assert (found.sums * STEP - sums).abs().max() <= 50 * STEP / 2
    assert (found.products * STEP**2 - products).abs().max() <= 50 * STEP


def test_the_longest_sums_fit_the_numbers_they_are_kept_in():
    """All images the same, along one axis: nothing gives greater products."""
    axis = torch.ones(ROWS_AT_ONCE, 1)
    found = moments_of(axis, torch.zeros(ROWS_AT_ONCE, dtype=torch.int64), 1)
    assert found.products.item() == ROWS_AT_ONCE * 2**40 == 2**53
    # From here on by adding up, to as many images as there may be.
    while 2 * int(found.counts) <= MOST_ROWS:
        found.add(copy.deepcopy(found))
    rest = MOST_ROWS - int(found.counts)
    for _ in range(rest // ROWS_AT_ONCE):
        found.update(axis, torch.zeros(ROWS_AT_ONCE, dtype=torch.int64))
    last = rest % ROWS_AT_ONCE
    found.update(axis[:last], torch.zeros(last, dtype=torch.int64))
    assert found.counts.item() == MOST_ROWS
    assert found.products.item() == MOST_ROWS * 2**40 < 2**63 <= (MOST_ROWS + 1) * 2**40


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, "NaN or infinite: the model has diverged"),
        (math.inf, "NaN or infinite: the model has diverged"),
        (-math.inf, "NaN or infinite: the model has diverged"),
        (1.01, "expected unit feature vectors"),
        (-1.01, "expected unit feature vectors"),
    ],
)
def test_vectors_that_cannot_be_summed_exactly_are_refused_and_change_nothing(bad, message):
    vectors, labels = draw(10)
    found = moments_of(vectors, labels, 5)
    wrong = vectors.clone()
    wrong[9, 6] = bad
    with pytest.raises(InputError, match=message):
        found.update(wrong, labels)
    assert_same_bits(found, moments_of(vectors, labels, 5))


def test_a_length_of_one_may_be_off_by_the_rounding_of_float32():
    found = moments_of(torch.tensor([[1.0 + 2**-23]]), torch.tensor([0]), 1)
    assert found.sums.item() == 2**20


def almost_full(more=0):
    found = FeatureMoments(1, 1)
    found.counts[0] = MOST_ROWS + more
    return found


def test_more_images_than_int64_holds_are_refused_however_they_come():
    one = moments_of(torch.ones(1, 1), torch.tensor([0]), 1)
    with pytest.raises(InputError, match="more than 8388607 images"):
        almost_full().update(torch.ones(1, 1), torch.tensor([0]))
    with pytest.raises(InputError, match="more than 8388607 images"):
        almost_full().add(one)
    with pytest.raises(InputError, match="more than 8388607 images"):
        one.reduce(lambda tensor: MOST_ROWS * tensor + tensor)
    almost_full(-1).add(moments_of(torch.ones(1, 1), torch.tensor([0]), 1))


@pytest.mark.parametrize("shape", [(4, 7), (5, 6)])
def test_moments_of_another_shape_are_not_added(shape):
    found = FeatureMoments(5, 7)
    with pytest.raises(InputError, match=rf"\[{shape[0]}, {shape[1]}\] .* \[5, 7\]"):
        found.add(FeatureMoments(*shape))


def test_moments_of_the_first_elements_are_those_of_shorter_vectors():
    vectors, labels = draw(400)
    assert_same_bits(moments_of(vectors, labels, 5).first(3), moments_of(vectors[:, :3], labels, 5))


def test_moments_go_to_tensors_and_back_as_copies():
    vectors, labels = draw(20)
    made = moments_of(vectors, labels, 5)
    found = FeatureMoments(5, 7)
    found.load_tensors(made.tensors())
    assert_same_bits(found, made)
    made.update(vectors, labels)
    assert_same_bits(found, moments_of(vectors, labels, 5))


def test_no_image_changes_nothing():
    vectors, labels = draw(20)
    found = moments_of(vectors, labels, 5)
    found.update(vectors[:0], labels[:0])
    assert_same_bits(found, moments_of(vectors, labels, 5))


def test_unit_vectors_are_float32_of_length_one():
    found = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
