"""The classifier of text head and class statistics against its formulas in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cl_merge.callbacks.voting import Classifier
from cl_merge.class_statistics import Discriminant, Vote
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead

CHOICES = [None, [3, 0], [2], torch.tensor([4, 1, 0, 2, 3])]


def discriminant(seed, classes=5, features=8):
    generator = torch.Generator().manual_seed(seed)
    weight = 5 * torch.randn(classes, features, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    bias[2] = -torch.inf
    return Discriminant(weight, bias, shrinkage=0.1)


def learned(**discriminants):
    """What a classifier asks of the statistics of a stream."""
    return SimpleNamespace(
        classes=5, vote=Vote(0.5, 0.25), discriminants=lambda: discriminants, gaussians=dict
    )


def text_head(classes=5):
    rows = 20 * torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    return ZeroShotHead(rows[:classes], list("abcde")[:classes])


class Turning(nn.Module):
    """Under the base weights features are in the reverse order."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def read(self, batch):
        return batch @ self.weight, None


BASE = {"weight": torch.eye(8).flip(0)}


def classifier(head, **discriminants):
    return Classifier("both", learned(**discriminants), head, Turning.read, BASE, None)


def formula(vectors, found, classes):
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    scores = unit @ found.weight.T + found.bias
    return scores if classes is None else scores[:, classes]


def draw():
    return 7 * torch.randn(20, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("classes", CHOICES, ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_without_a_text_head_statistics_decide_in_float32(classes, precision, autocast):
    vectors, found = draw().to(precision), discriminant(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = classifier(None, merged=found)(Turning(), None, vectors, classes)
    assert logits.dtype == torch.float32
    expected = formula(vectors, found, classes).log_softmax(dim=1)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("classes", CHOICES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_text_head_votes_with_the_mean_of_the_statistics_of_both_encoders(classes, autocast):
    vectors, head, (first, second) = draw(), text_head(), (discriminant(0), discriminant(1))
    whole = vectors.round()  # as bfloat16 has them too, in which the base encoder may multiply
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = classifier(head, base=first, merged=second)(Turning(), whole, vectors, classes)
    assert found.dtype == torch.float32
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    text = unit @ head.weight.double().T
    text = text if classes is None else text[:, classes]
    scores = formula(whole.flip(1), first, classes) + formula(vectors, second, classes)
    expected = Vote(0.5, 0.25).combine(text, scores / 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_a_text_head_of_other_classes_does_not_vote():
    with pytest.raises(InputError, match="statistics of 5 classes beside a text head of 4; expect"):
        classifier(text_head(4), merged=discriminant(0))
