"""Heads against their formulas in float64."""

import pytest
import torch

from cl_merge.class_statistics import Discriminant, EnsembleHead, StatisticsHead, Vote
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead

CHOICES = [None, [3, 0], [2], torch.tensor([4, 1, 0, 2, 3])]


def case(seed=0, classes=5, features=8):
    generator = torch.Generator().manual_seed(seed)
    weight = 5 * torch.randn(classes, features, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    bias[2] = -torch.inf
    vectors = 7 * torch.randn(20, features, generator=generator)
    return vectors, Discriminant(weight, bias, shrinkage=0.1)


def formula(vectors, discriminant, classes):
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    scores = unit @ discriminant.weight.T + discriminant.bias
    return scores if classes is None else scores[:, classes]


@pytest.mark.parametrize("classes", CHOICES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_statistics_score_unit_features_in_float32(classes, autocast):
    vectors, discriminant = case()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = StatisticsHead(discriminant)(vectors, classes)
    assert found.dtype == torch.float32
    expected = formula(vectors, discriminant, classes)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_features_of_half_precision_are_scored_in_float32_too():
    vectors, discriminant = case()
    found = StatisticsHead(discriminant)(vectors.bfloat16())
    expected = formula(vectors.bfloat16(), discriminant, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", CHOICES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_an_ensemble_votes_with_the_mean_of_the_statistics(classes, autocast):
    (vectors, first), (others, second) = case(0), case(1)
    rows = 20 * torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    text, vote = ZeroShotHead(rows, list("abcde")), Vote(0.5, 0.25)
    head = EnsembleHead(text, [StatisticsHead(first), StatisticsHead(second)], vote)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = head(vectors, [vectors, others], classes)
    assert found.dtype == torch.float32
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    logits = unit @ rows.double().T
    logits = logits if classes is None else logits[:, classes]
    scores = (formula(vectors, first, classes) + formula(others, second, classes)) / 2
    expected = vote.combine(logits, scores)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_nothing_in_the_heads_trains_and_they_say_what_they_are():
    _, discriminant = case()
    head = StatisticsHead(discriminant)
    assert not list(head.parameters())
    assert str(head) == "StatisticsHead(classes=5, seen=4, features=8)"
    assert set(head.state_dict()) == {"weight", "bias"}


def test_heads_of_other_classes_or_none_do_not_vote():
    head = StatisticsHead(case()[1])
    text = ZeroShotHead(torch.eye(8)[:4], list("abcd"))
    with pytest.raises(InputError, match=r"statistics of \[5\] classes beside a text head of 4"):
        EnsembleHead(text, [head], Vote())
    with pytest.raises(InputError, match=r"statistics of \[\] classes beside a text head of 4"):
        EnsembleHead(text, [], Vote())


def test_features_of_every_encoder_are_needed():
    vectors, discriminant = case()
    text = ZeroShotHead(torch.eye(8)[:5], list("abcde"))
    head = EnsembleHead(text, [StatisticsHead(discriminant)] * 2, Vote())
    with pytest.raises(ValueError, match="zip"):
        head(vectors, [vectors])
