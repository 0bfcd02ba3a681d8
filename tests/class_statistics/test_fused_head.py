"""Fused features: the text head alone predicts what a vote of head and statistics predicts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_vectors import gaussians_of

from cl_merge.class_statistics import (
    Discriminant,
    Vote,
    fused_map,
    fused_projection,
    unit,
)
from cl_merge.errors import InputError


def case(classes=5, features=24, images=1000, seed=0, unseen=()):
    """Features with much in common, as those of image encoders have, and a text head of D > C."""
    generator = torch.Generator().manual_seed(seed)
    common = 3 * torch.randn(features, generator=generator)
    means = common + torch.randn(classes, features, generator=generator)
    seen = torch.tensor([label for label in range(classes) if label not in unseen])
    labels = seen[torch.randint(len(seen), (images,), generator=generator)]
    vectors = unit(means[labels] + 0.9 * torch.randn(images, features, generator=generator))
    head = 30 * unit(means + 1.5 * torch.randn(classes, features, generator=generator))
    return vectors.double(), gaussians_of(vectors, labels, classes), head.double()


def centred(scores):
    return scores - scores.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("vote", [Vote(), Vote(0.1, 0.2), Vote(1.0, 0.05), Vote(0.0, 1.0)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_text_head_on_fused_features_predicts_what_the_vote_predicts(vote, seed):
    vectors, gaussians, head = case(seed=seed)
    fused = fused_map(gaussians, head, vote)
    found = F.normalize(vectors @ fused.T, dim=1) @ head.T
    scores = Discriminant.of(gaussians).scores(vectors)
    voted = vote.combine(vectors @ head.T, scores)
    agree = (found.argmax(dim=1) == voted.argmax(dim=1)).double().mean()
    assert agree >= 0.99
    alone = (vectors @ head.T).argmax(dim=1)
    if vote != Vote(1.0, 0.05):
        assert (alone == voted.argmax(dim=1)).double().mean() < agree, "the case shows nothing"


def test_logits_of_fused_features_are_the_votes_up_to_what_classes_share():
    vectors, gaussians, head = case()
    vote = Vote(0.4, 0.7)
    found = Discriminant.of(gaussians)
    # What stands for the constant 1: the linear function of features that fits it best.
    second = vectors.T.numpy() @ vectors.numpy() / len(vectors)
    ridge = 1e-4 * np.trace(second) / 24 * np.eye(24)
    one = vectors.numpy() @ np.linalg.solve(second + ridge, vectors.numpy().mean(axis=0))
    assert np.abs(one - 1).max() < 0.2
    statistics = vectors @ found.weight.T + torch.from_numpy(one)[:, None] * found.bias
    expected = centred(0.4 * vectors @ head.T + 0.7 * statistics)
    logits = centred(vectors @ fused_map(gaussians, head, vote).T @ head.T)
    # Up to the factor that keeps lengths.
    factor = (logits * expected).sum() / (expected * expected).sum()
    assert factor > 0
    torch.testing.assert_close(logits, factor * expected, rtol=0, atol=1e-3 * float(logits.max()))


def test_fused_features_keep_their_length_on_average():
    vectors, gaussians, head = case()
    fused = vectors @ fused_map(gaussians, head, Vote(0.4, 0.7)).T
    assert float((fused**2).sum(dim=1).mean()) == pytest.approx(1.0, rel=1e-4)


def test_without_a_say_of_the_statistics_nothing_changes():
    _, gaussians, head = case()
    fused = fused_map(gaussians, head, Vote(2.0, 0.0))
    torch.testing.assert_close(fused, torch.eye(24, dtype=torch.float64))


def test_classes_not_seen_get_what_the_average_class_gets():
    vectors, gaussians, head = case(unseen=[1, 4])
    fused = vectors @ fused_map(gaussians, head, Vote(0.4, 0.7)).T
    text, logits = vectors @ head.T, fused @ head.T
    factor = float(
        torch.linalg.lstsq(
            centred(text[:, [1, 4]])[:, :1], centred(logits[:, [1, 4]])[:, :1]
        ).solution
    )
    beyond = logits - factor * text
    average = beyond[:, [0, 2, 3]].mean(dim=1)
    scale = float(beyond.std(dim=1).mean())
    for label in (1, 4):
        torch.testing.assert_close(beyond[:, label], average, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("text", [0.0, 1.0])
def test_a_single_class_seen_leaves_features_as_they_are(text):
    _, gaussians, head = case(unseen=[0, 1, 3, 4])
    fused = fused_map(gaussians, head, Vote(text, 1.0))
    torch.testing.assert_close(fused, torch.eye(24, dtype=torch.float64))


def test_more_classes_than_features_and_a_degenerate_head_give_numbers():
    _, gaussians, head = case(classes=40, features=24)
    assert fused_map(gaussians, head, Vote()).isfinite().all()
    head[1] = head[0]
    assert fused_map(gaussians, head, Vote()).isfinite().all()


class WithParameter(torch.nn.Module):
    """Ends as open_clip's vision transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)
        self.proj = torch.nn.Parameter(torch.randn(5, 3))

    def forward(self, images):
        return self.layer(images) @ self.proj


class WithLayer(torch.nn.Module):
    """Ends as open_clip's encoders from timm do."""

    def __init__(self, bias=False):
        super().__init__()
        self.trunk = torch.nn.Linear(6, 5)
        self.head = torch.nn.Sequential()
        self.head.add_module("drop", torch.nn.Dropout(0.0))
        self.head.add_module("proj", torch.nn.Linear(5, 3, bias=bias))

    def forward(self, images):
        return self.head(self.trunk(images))


@pytest.mark.parametrize("encoder", [WithParameter, WithLayer])
@torch.no_grad()
def test_an_encoder_with_the_new_projection_makes_fused_features(encoder):
    torch.manual_seed(0)
    visual, images = encoder(), torch.randn(7, 6)
    fused = torch.randn(3, 3, dtype=torch.float64)
    before = visual(images)
    name, value = fused_projection(visual, fused)
    torch.testing.assert_close(visual(images), before)  # not yet
    parameter = visual.get_parameter(name)
    assert (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
    parameter.copy_(value)
    torch.testing.assert_close(visual(images), before @ fused.T.float())


def test_a_projection_keeps_its_type():
    visual = WithParameter().bfloat16()
    assert fused_projection(visual, torch.eye(3).double())[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "encoder", [WithLayer(bias=True), torch.nn.Linear(6, 3)], ids=["with a bias", "none"]
)
def test_another_end_of_an_encoder_is_refused(encoder):
    message = f"{type(encoder).__name__} does not end with a linear projection without bias"
    with pytest.raises(InputError, match=message):
        fused_projection(encoder, torch.eye(3).double())
