"""The vote as a rule of probabilities, and its choice against a naive search."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax

from cl_merge.class_statistics import Vote, choose_vote, vote_losses

VOTES = [Vote(), Vote(0.0, 0.7), Vote(0.3, 1.6), Vote(2.0, 0.0)]


def draw(images=6, classes=5, unseen=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    text, scores = (
        size * torch.randn(images, classes, generator=generator, dtype=torch.float64)
        for size in (3.0, 20.0)
    )
    scores[:, list(unseen)] = -torch.inf
    return text, scores


@pytest.mark.parametrize("vote", VOTES, ids=str)
@pytest.mark.parametrize("unseen", [[], [1], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_the_text_head_says_which_share_is_seen_and_both_divide_it(vote, unseen):
    text, scores = draw(unseen=unseen)
    found = vote.combine(text, scores).exp().numpy()
    expected = softmax(text.numpy(), axis=1)
    seen = [label for label in range(5) if label not in unseen]
    if seen:
        within = vote.text * text.numpy()[:, seen] + vote.statistics * scores.numpy()[:, seen]
        share = expected[:, seen].sum(axis=1, keepdims=True)
        expected[:, seen] = share * softmax(within, axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=0, atol=1e-14)


def test_classes_not_seen_keep_the_text_heads_log_probability_bit_for_bit():
    text, scores = draw(unseen=[1, 2])
    found = Vote(0.4, 1.3).combine(text, scores)
    assert torch.equal(found[:, [1, 2]], text.log_softmax(dim=1)[:, [1, 2]])


def test_without_a_say_of_the_text_head_the_statistics_decide_among_classes_seen():
    text, scores = draw(images=50, unseen=[4])
    found = Vote(text=0.0, statistics=1.0).combine(text, scores)
    assert torch.equal(found[:, :4].argmax(dim=1), scores[:, :4].argmax(dim=1))


def test_if_all_classes_are_seen_both_are_added_up():
    text, scores = draw()
    expected = log_softmax(0.5 * text.numpy() + 2.0 * scores.numpy(), axis=1)
    np.testing.assert_allclose(
        Vote(0.5, 2.0).combine(text, scores).numpy(), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("unseen", [[], [1], [0, 1, 2, 3, 4]], ids=str)
def test_gradients_are_numbers(unseen):
    text, scores = draw(unseen=unseen)
    text.requires_grad_()
    Vote().combine(text, scores)[:, 1].sum().backward()
    assert text.grad.isfinite().all()
    assert text.grad.any()


def draw_choice(images, seed=0, trust=(2.0, 12.0), unseen=(4,)):
    """Text head and statistics that both know something, each to its own scale."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.tensor([label for label in range(6) if label not in unseen])
    labels = seen[torch.randint(len(seen), (images,), generator=generator)]
    noise = torch.randn(2, images, 6, generator=generator, dtype=torch.float64)
    text, scores = (
        scale * (F.one_hot(labels, 6) + noise[index]) for index, scale in enumerate(trust)
    )
    scores[:, list(unseen)] = -torch.inf
    return text, scores, labels


def searched(text, scores, labels):
    """The vote of least cross entropy over classes seen, tried one by one."""
    seen = [label for label in range(6) if scores[0, label] > -torch.inf]
    best, found = np.inf, None
    for weight in [2 ** (exponent / 2) for exponent in range(-10, 9)]:
        mixed = text.numpy()[:, seen] + weight * scores.numpy()[:, seen]
        for temperature in [2 ** (exponent / 2) for exponent in range(-10, 7)]:
            logs = log_softmax(temperature * mixed, axis=1)
            losses = [-row[seen.index(label)] for row, label in zip(logs, labels, strict=True)]
            loss = np.minimum(losses, 1024.0).sum()
            if loss < best:
                best, found = loss, Vote(temperature, temperature * weight)
    return found


@pytest.mark.parametrize("unseen", [(), (4,), (0, 2)], ids=str)
@pytest.mark.parametrize("trust", [(2.0, 12.0), (30.0, 1.0), (0.1, 0.1), (90.0, 900.0)], ids=str)
def test_the_choice_is_that_of_a_search_one_by_one(trust, unseen):
    text, scores, labels = draw_choice(150, trust=trust, unseen=unseen)
    assert choose_vote(vote_losses(text, scores, labels)) == searched(text, scores, labels.tolist())


def test_the_choice_is_the_same_in_pieces():
    text, scores, labels = draw_choice(150)
    whole = choose_vote(vote_losses(text, scores, labels))
    assert choose_vote(vote_losses(text, scores, labels, elements_at_once=33)) == whole


@pytest.mark.parametrize("ends", [(0, 75, 150), (0, 149, 150), (0, 150, 150)], ids=str)
def test_the_choice_does_not_depend_on_how_images_are_spread_over_processes(ends):
    text, scores, labels = draw_choice(150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    parts, barrier = {}, threading.Barrier(2, timeout=30)

    def process(rank):
        def total(tensor):
            parts[rank] = tensor
            barrier.wait()
            return parts[0] + parts[1]

        own = order[ends[rank] : ends[rank + 1]]
        return choose_vote(vote_losses(text[own], scores[own], labels[own], total=total))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(process, range(2)))
    assert found == [choose_vote(vote_losses(text, scores, labels))] * 2


def test_what_tasks_lose_adds_up():
    text, scores, labels = draw_choice(150)
    parts = (slice(0, 40), slice(40, 150))
    losses = sum(vote_losses(text[part], scores[part], labels[part]) for part in parts)
    assert torch.equal(losses, vote_losses(text, scores, labels))


def test_what_knows_nothing_gets_a_small_say():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (600,), generator=generator)
    knows = 8.0 * F.one_hot(labels, 6) + 2.0 * torch.randn(600, 6, generator=generator)
    noise = 8.0 * torch.randn(600, 6, generator=generator)
    doubting, trusting = (
        choose_vote(vote_losses(knows, noise, labels)),
        choose_vote(vote_losses(noise, knows, labels)),
    )
    assert doubting.text > 8 * doubting.statistics
    assert trusting.statistics > 8 * trusting.text


def test_a_label_among_classes_not_seen_does_not_pass_for_another():
    text, scores, labels = draw_choice(150, unseen=())
    with_stray = labels.clone()
    with_stray[0] = 4
    scores[:, 4] = -torch.inf
    kept = labels != 4
    kept[0] = False
    expected = choose_vote(vote_losses(text[kept], scores[kept], labels[kept]))
    kept[0] = True
    assert choose_vote(vote_losses(text[kept], scores[kept], with_stray[kept])) == expected


@pytest.mark.parametrize("images", [0, 3], ids=["no image", "one class seen"])
def test_with_nothing_to_choose_by_both_count_as_they_are(images):
    scores = torch.full((images, 6), -torch.inf)
    scores[:, 2] = 1.0
    labels = torch.full((images,), 2)
    assert choose_vote(vote_losses(torch.randn(images, 6), scores, labels)) == Vote(1.0, 1.0)
