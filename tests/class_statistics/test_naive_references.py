"""Class statistics against naive references that keep every vector, in float64."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from cl_merge.class_statistics import (
    CarriedStatistics,
    ClassGaussians,
    Discriminant,
    EnsembleHead,
    FeatureMoments,
    StatisticsHead,
    StreamStatistics,
    Vote,
    align,
    aligned_projection,
    choose_vote,
    left_out_scores,
    oas_shrinkage,
    unit,
)
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead


def draw(seed, images=60, classes=4, features=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    means = torch.randn(classes, features, generator=generator)
    vectors = unit(means[labels] + 0.5 * torch.randn(images, features, generator=generator))
    return vectors, labels


def moments_of(vectors, labels, classes):
    made = FeatureMoments(classes, vectors.shape[1])
    made.update(vectors, labels)
    return made


def naive(vectors, labels, classes):
    vectors = vectors.double()
    means = torch.zeros(classes, vectors.shape[1], dtype=torch.float64)
    scatter = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for label in range(classes):
        own = vectors[labels == label]
        if len(own):
            means[label] = own.mean(dim=0)
            for vector in own:
                scatter += torch.outer(vector - means[label], vector - means[label])
    return means, scatter


def same_bits(one, other):
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


# Moments


@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_any_split_give_the_same_bits(seed):
    vectors, labels = draw(seed, images=301)
    whole = moments_of(vectors, labels, 4)
    order = torch.randperm(301, generator=torch.Generator().manual_seed(seed))
    shuffled = FeatureMoments(4, 6)
    for rows in order.split(17):
        shuffled.update(vectors[rows], labels[rows])
    assert same_bits(whole, shuffled)
    parts = [moments_of(vectors[rank::3], labels[rank::3], 4) for rank in range(3)]
    total = parts[2]
    total.add(parts[0])
    total.add(parts[1])
    assert same_bits(whole, total)


def test_more_rows_than_are_summed_at_once_are_exact_too():
    vectors = unit(torch.ones(20_000, 2))
    found = moments_of(vectors, torch.zeros(20_000, dtype=torch.int64), 1)
    one = round(math.sqrt(0.5) * 2**20)
    assert found.products.tolist() == [[20_000 * one**2] * 2] * 2


def test_moments_are_the_sums_to_the_rounding_step():
    vectors, labels = draw(0)
    found = moments_of(vectors, labels, 4)
    sums = torch.zeros(4, 6, dtype=torch.float64).index_add_(0, labels, vectors.double())
    torch.testing.assert_close(found.sums.double() * found.step, sums, rtol=0, atol=60 * found.step)
    products = vectors.double().T @ vectors.double()
    torch.testing.assert_close(found.products.double() * found.step**2, products, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.5])
def test_vectors_that_cannot_be_summed_exactly_are_refused(bad):
    with pytest.raises(InputError, match="NaN or infinite|unit feature vectors"):
        moments_of(torch.tensor([[bad, 0.0]]), torch.tensor([0]), 1)


def test_more_images_than_int64_holds_are_refused():
    found = FeatureMoments(1, 2)
    found.counts[0] = 2**23
    with pytest.raises(InputError, match="more than 8388607 images"):
        found.update(torch.zeros(1, 2), torch.tensor([0]))


# Distributions and discriminant


@pytest.mark.parametrize("seed", range(3))
def test_gaussians_match_the_naive_reference(seed):
    vectors, labels = draw(seed)
    labels[labels == 3] = 0  # class 3 is not seen
    found = ClassGaussians.of(moments_of(vectors, labels, 4))
    means, scatter = naive(vectors, labels, 4)
    torch.testing.assert_close(found.means, means, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scatter, scatter, rtol=0, atol=1e-4)
    assert found.seen.tolist() == [True, True, True, False]


def test_one_image_a_class_is_classified_by_the_nearest_mean():
    vectors = unit(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    found = ClassGaussians.of(moments_of(vectors, torch.tensor([0, 1]), 2))
    covariance, share = found.covariance()
    assert share == 1.0
    assert covariance.tolist() == torch.eye(2).tolist()
    assert Discriminant.of(found).scores(vectors).argmax(dim=1).tolist() == [0, 1]


@pytest.mark.parametrize("features", [5, 50])
def test_shrinkage_is_the_published_formula(features):
    samples = torch.randn(20, features, dtype=torch.float64)
    sample = samples.T @ samples / 20
    trace, squares = sample.trace(), (sample @ sample).trace()
    above = (1 - 2 / features) * squares + trace**2
    below = (20 + 1 - 2 / features) * (squares - trace**2 / features)
    assert oas_shrinkage(sample, 20) == pytest.approx(min(1.0, float(above / below)), rel=1e-10)


def test_discriminant_is_the_log_density_up_to_what_classes_share():
    vectors, labels = draw(1)
    gaussians = ClassGaussians.of(moments_of(vectors, labels, 4))
    covariance, _ = gaussians.covariance()
    scores = Discriminant.of(gaussians).scores(vectors)
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean, covariance).log_prob(vectors.double())
            for mean in gaussians.means
        ],
        dim=1,
    )
    torch.testing.assert_close(scores.log_softmax(1), densities.log_softmax(1))


def test_left_out_scores_are_those_of_statistics_without_the_vector():
    vectors, labels = draw(2)
    gaussians = ClassGaussians.of(moments_of(vectors, labels, 4))
    _, share = gaussians.covariance()
    size = (gaussians.scatter / gaussians.freedom).diagonal().mean()
    found = left_out_scores(vectors, labels, gaussians)
    for row in range(len(vectors)):
        kept = torch.arange(len(vectors)) != row
        means, scatter = naive(vectors[kept], labels[kept], 4)
        inverse = torch.linalg.inv(
            (1 - share) * scatter / gaussians.freedom + share * size * torch.eye(6)
        )
        apart = vectors[row].double() - means
        expected = -0.5 * (apart @ inverse * apart).sum(dim=1)
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


# Statistics that are carried


def naive_carried(tasks, classes, ridge):
    """Keep all old pairs of base and merged vectors, and move each merged one."""
    size = tasks[0][0].shape[1]
    identity = torch.eye(size, dtype=torch.float64)
    weight, bias = identity.clone(), torch.zeros(size, dtype=torch.float64)
    bases, mergeds, labels = [], [], []
    for base, merged, label in tasks:
        base, merged = base.double(), merged.double()
        centred = base - base.mean(dim=0)
        target = merged - base @ weight
        target = target - target.mean(dim=0)
        square = centred.T @ centred / len(base)
        change = torch.linalg.solve(
            square + ridge * square.diagonal().mean() * identity, centred.T @ target / len(base)
        )
        shift = (merged - base @ (weight + change)).mean(dim=0) - bias
        mergeds = [old + b @ change + shift for b, old in zip(bases, mergeds, strict=True)]
        weight, bias = weight + change, bias + shift
        bases, mergeds, labels = [*bases, base], [*mergeds, merged], [*labels, label]
    return naive(torch.cat(mergeds), torch.cat(labels), classes)


@pytest.mark.parametrize("disjoint", [True, False], ids=["class by class", "classes come back"])
@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_carried_statistics_move_every_old_vector(disjoint, ridge):
    tasks = []
    for task in range(3):
        base, labels = draw(task, classes=2 if disjoint else 6)
        mixing = torch.eye(6) + 0.2 * torch.randn(6, 6)
        tasks.append((base, unit(base @ mixing), labels + (2 * task if disjoint else 0)))
    kept, before = CarriedStatistics(6, 6, ridge), FeatureMoments(6, 6)
    sizes = []
    for base, merged, labels in tasks:
        kept.update(before, moments_of(torch.cat([base, merged], dim=1), labels, 6))
        before.update(base, labels)
        sizes.append(sum(tensor.numel() for tensor in kept.tensors().values()))
    means, scatter = naive_carried(tasks, 6, ridge)
    found = kept.gaussians(before.counts)
    torch.testing.assert_close(found.means[found.seen], means[found.seen], rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scatter, scatter, rtol=0, atol=1e-2)
    assert all(one == other for one, other in pairwise(sizes)), "memory grows with tasks"


def test_what_moves_linearly_is_carried_truly():
    first, first_labels = draw(0, images=400, classes=2)
    second, second_labels = draw(1, images=400, classes=2)
    mixing = torch.eye(6) + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
    mixing = mixing / torch.linalg.matrix_norm(mixing, 2)
    kept, before = CarriedStatistics(4, 6, ridge=1e-6), FeatureMoments(4, 6)
    kept.update(before, moments_of(torch.cat([first, first], dim=1), first_labels, 4))
    before.update(first, first_labels)
    after = second @ mixing
    kept.update(before, moments_of(torch.cat([second, after], dim=1), second_labels + 2, 4))
    means, _ = naive(first @ mixing, first_labels, 4)
    torch.testing.assert_close(kept.means[:2], means[:2], rtol=0, atol=1e-3)


# The vote


def test_classes_that_were_not_seen_keep_the_text_heads_probability():
    text, scores = torch.randn(5, 4), torch.randn(5, 4)
    scores[:, 3] = -torch.inf
    voted = Vote(0.7, 1.3).combine(text, scores)
    torch.testing.assert_close(voted[:, 3], text.log_softmax(1)[:, 3])
    torch.testing.assert_close(voted.exp().sum(dim=1), torch.ones(5))
    within = (0.7 * text + 1.3 * scores)[:, :3].log_softmax(1)
    torch.testing.assert_close(voted[:, :3].log_softmax(1), within)


def test_what_knows_nothing_gets_a_small_say():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400,), generator=generator)
    knows = 4 * F.one_hot(labels, 5) + torch.randn(400, 5, generator=generator)
    noise = 4 * torch.randn(400, 5, generator=generator)
    trusting = choose_vote(noise, knows, labels)
    doubting = choose_vote(knows, noise, labels)
    assert trusting.statistics > 4 * trusting.text
    assert doubting.text > 4 * doubting.statistics


def test_the_vote_does_not_depend_on_how_images_are_spread():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, (100,), generator=generator)
    text = 2 * F.one_hot(labels, 5) + torch.randn(100, 5, generator=generator)
    scores = 3 * F.one_hot(labels, 5) + 2 * torch.randn(100, 5, generator=generator)
    scores[:, 4] = -torch.inf
    labels[labels == 4] = 0
    alone = choose_vote(text, scores, labels)
    order = torch.randperm(100, generator=generator)
    assert choose_vote(text[order], scores[order], labels[order]) == alone
    assert choose_vote(text[:0], scores[:0], labels[:0]) == Vote()


# Heads and alignment


def aligned_case(seed):
    vectors, labels = draw(seed, images=200, classes=4, features=6)
    gaussians = ClassGaussians.of(moments_of(vectors, labels, 4))
    head = 20 * unit(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + 9)))
    return vectors, gaussians, head


def test_heads_are_the_formula_for_any_classes_and_under_autocast():
    vectors, gaussians, rows = aligned_case(0)
    discriminant = Discriminant.of(gaussians)
    head = StatisticsHead(discriminant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(3 * vectors, classes=[2, 0])
    expected = discriminant.scores(vectors)[:, [2, 0]]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    text = ZeroShotHead(rows, list("abcd"))
    both = EnsembleHead(text, [head, head], Vote(0.5, 0.25))
    voted = Vote(0.5, 0.25).combine(text(vectors), head(vectors))
    torch.testing.assert_close(both(vectors, [vectors, vectors]), voted)


def test_heads_of_other_classes_do_not_vote_together():
    _, gaussians, rows = aligned_case(0)
    with pytest.raises(InputError, match=r"statistics of \[4\] classes beside a text head of 3"):
        EnsembleHead(
            ZeroShotHead(rows[:3], list("abc")),
            [StatisticsHead(Discriminant.of(gaussians))],
            Vote(),
        )


@pytest.mark.parametrize("seed", range(3))
def test_the_text_head_on_aligned_features_predicts_what_the_vote_predicts(seed):
    vectors, gaussians, head = aligned_case(seed)
    vote = Vote(0.3, 0.2)
    aligned = unit(vectors.double() @ align(gaussians, head, vote).T) @ head.T
    found = Discriminant.of(gaussians)
    # The constants of the discriminant as the linear function of features that is nearly 1.
    mean, second = gaussians.second_moment()
    one = vectors.double() @ torch.linalg.solve(
        second + 1e-4 * second.trace() / 6 * torch.eye(6), mean
    )
    linear = vectors.double() @ found.weight.T + one[:, None] * found.bias
    expected = 0.3 * vectors.double() @ head.double().T + 0.2 * linear
    agree = (aligned.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
    assert agree > 0.99
    voted = vote.combine(vectors @ head.T, found.scores(vectors))
    assert (aligned.argmax(dim=1) == voted.argmax(dim=1)).double().mean() > 0.9


@pytest.mark.parametrize("layout", ["proj", "head.proj"])
def test_an_alignment_is_one_with_the_projection(layout):
    alignment = torch.randn(3, 3, dtype=torch.float64)
    visual = torch.nn.Module()
    hidden = torch.randn(4, 5)
    if layout == "proj":
        visual.proj = torch.nn.Parameter(torch.randn(5, 3))
        before = hidden @ visual.proj
    else:
        visual.head = torch.nn.Sequential()
        visual.head.proj = torch.nn.Linear(5, 3, bias=False)
        before = visual.head.proj(hidden)
    name, value = aligned_projection(visual, alignment)
    after = hidden @ (value if layout == "proj" else value.T)
    assert name == ("proj" if layout == "proj" else "head.proj.weight")
    torch.testing.assert_close(after, before @ alignment.float().T, rtol=1e-4, atol=1e-4)


def test_an_encoder_without_a_projection_cannot_be_aligned():
    with pytest.raises(InputError, match="Linear does not end with a linear projection"):
        aligned_projection(torch.nn.Linear(2, 2), torch.eye(2, dtype=torch.float64))


# All of it


@pytest.mark.parametrize("encoders", ["both", "base", "merged"])
def test_statistics_of_a_stream_go_to_a_file_and_back(encoders, tmp_path):
    made = StreamStatistics(4, 6, encoders)
    for seed in range(2):
        vectors, labels = draw(seed)
        made.learn(vectors, unit(vectors + 0.1), labels, text=torch.randn(60, 4))
    made.save(tmp_path / "statistics.safetensors")
    found = StreamStatistics.load(tmp_path / "statistics.safetensors")
    assert (found.encoders, found.tasks, found.vote) == (encoders, 2, made.vote)
    state = made.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert list(found.discriminants()) == {"both": ["base", "merged"]}.get(encoders, [encoders])


def test_a_file_of_something_else_is_refused(tmp_path):
    from cl_merge.storage.files import save_tensors

    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="x.safetensors: holds no class statistics"):
        StreamStatistics.load(tmp_path / "x.safetensors")
    save_tensors(
        tmp_path / "y.safetensors",
        {"base.sums": torch.zeros(1, 1)},
        {"format": "cl_merge.class_statistics", "encoders": "both"},
    )
    with pytest.raises(InputError, match="y.safetensors: damaged class statistics"):
        StreamStatistics.load(tmp_path / "y.safetensors")


def test_wrong_options_and_labels_are_named():
    with pytest.raises(InputError, match="did you mean 'both'"):
        StreamStatistics(2, 2, "bot")
    with pytest.raises(InputError, match="ridge=0"):
        StreamStatistics(2, 2, ridge=0)
    with pytest.raises(
        InputError, match="labels from 0 to 2, but the statistics are of 2 classes; expected 0 to 1"
    ):
        StreamStatistics(2, 2).learn(torch.eye(2), torch.eye(2), torch.tensor([0, 2]))
