"""All statistics of a stream: by hand, over processes, on disk."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from feature_vectors import moments_of

from cl_merge.class_statistics import (
    ENCODERS,
    ClassGaussians,
    ClassScatters,
    Discriminant,
    DriftCompensation,
    FeatureMoments,
    QuadraticDiscriminant,
    StreamStatistics,
    Vote,
    choose_vote,
    leave_one_out_scores,
    unit,
    vote_losses,
)
from cl_merge.errors import InputError
from cl_merge.storage.files import load_tensors, save_tensors

CLASSES, FEATURES = 6, 5
STREAM = [[0, 1], [2, 3], [1, 4]]


def draw_task(task, images=60):
    """Base and merged features, labels and logits of a task's images."""
    generator = torch.Generator().manual_seed(task)
    means = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    classes = torch.tensor(STREAM[task])
    labels = classes[torch.randint(len(classes), (images,), generator=generator)]
    base = means[labels] + 0.7 * torch.randn(images, FEATURES, generator=generator)
    merged = base + 0.3 * torch.randn(images, FEATURES, generator=generator)
    text = 3 * torch.randn(images, CLASSES, generator=generator)
    text[torch.arange(images), labels] += 2.0
    return unit(base), unit(merged), labels, text


def learned(encoders="both", tasks=3, **options):
    made = StreamStatistics(CLASSES, FEATURES, encoders, **options)
    for task in range(tasks):
        made.learn(*draw_task(task))
    return made


def assert_same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("encoders", ENCODERS)
def test_learning_is_moments_and_drift_compensation_and_a_vote(encoders):
    base, drift = FeatureMoments(CLASSES, FEATURES), DriftCompensation(CLASSES, FEATURES, 0.25, 2.0)
    found = StreamStatistics(CLASSES, FEATURES, encoders, ridge=0.25, hold=2.0, rank=0)
    losses: torch.Tensor | int = 0
    for task in range(3):
        vectors, merged, labels, text = draw_task(task)
        both = moments_of(torch.cat([vectors, merged], dim=1), labels, CLASSES)
        drift.update(base, both)
        base.update(vectors, labels)
        pairs = {
            "base": (vectors, ClassGaussians.of(base)),
            "merged": (merged, drift.gaussians(base.counts)),
        }
        names = ["base", "merged"] if encoders == "both" else [encoders]
        scores = [leave_one_out_scores(pairs[n][0], labels, pairs[n][1]) for n in names]
        losses = losses + vote_losses(text, sum(scores) / len(scores), labels)

        found.learn(vectors, None if encoders == "base" else merged, labels, text)
        assert found.tasks == task + 1
        assert found.vote == choose_vote(losses)  # of all tasks so far
        assert list(found.gaussians()) == list(found.discriminants()) == names
        for name in names:
            gaussians, ours = pairs[name][1], found.gaussians()[name]
            assert torch.equal(ours.counts, gaussians.counts)
            assert torch.equal(ours.means, gaussians.means)
            assert torch.equal(ours.scatter, gaussians.scatter)
            weight = Discriminant.of(gaussians).weight
            assert torch.equal(found.discriminants()[name].weight, weight)
    assert found.vote != Vote()
    assert (found.classes, found.features) == (CLASSES, FEATURES)


@pytest.mark.parametrize("encoders", ["both", "base"])
def test_classes_have_covariances_of_their_own_under_the_base_encoder(encoders):
    found, linear = (StreamStatistics(CLASSES, FEATURES, encoders, rank=r) for r in (3, 0))
    scatters, losses = ClassScatters(CLASSES, FEATURES, 3), 0
    for task in range(3):
        base, merged, labels, text = draw_task(task)
        before = linear.gaussians()["base"]
        linear.learn(base, merged, labels, text)
        shared = linear.gaussians()["base"].covariance()[0]
        for label in labels.unique().tolist():
            own = base[labels == label]
            one = ClassGaussians.of(moments_of(own, torch.zeros(len(own), dtype=torch.int64), 1))
            scatters.update(label, one, before, shared)
        quadratic = QuadraticDiscriminant(linear.gaussians()["base"], scatters)
        scores = [quadratic.leave_one_out_scores(base, labels)]
        if encoders == "both":
            merged_ones = linear.gaussians()["merged"]
            scores.append(leave_one_out_scores(merged, labels, merged_ones))
        found.learn(base, merged, labels, text)
        losses = losses + vote_losses(text, sum(scores) / len(scores), labels)
        assert found.vote == choose_vote(losses)
        assert torch.equal(found.discriminants()["base"].scores(base), quadratic.scores(base))


def test_without_logits_the_text_head_has_no_say_among_classes_seen():
    found = StreamStatistics(CLASSES, FEATURES)
    found.learn(*draw_task(0)[:3])
    assert found.vote == Vote(text=0.0)


def test_an_only_image_of_its_class_does_not_take_part_in_the_choice():
    base, merged, labels, text = draw_task(0)
    strange = torch.cat([labels, torch.tensor([5])])
    wrong = torch.full((1, CLASSES), 50.0)
    wrong[0, 5] = -50.0
    found = StreamStatistics(CLASSES, FEATURES, "base", rank=0)
    found.learn(torch.cat([base, base[:1]]), None, strange, torch.cat([text, wrong]))
    assert found.base.counts[5] == 1
    gaussians = found.gaussians()["base"]
    assert found.vote == choose_vote(
        vote_losses(text, leave_one_out_scores(base, labels, gaussians), labels)
    )
    alone = StreamStatistics(CLASSES, FEATURES)
    alone.learn(base[:2], merged[:2], torch.tensor([0, 1]), text[:2])
    assert alone.vote == Vote()


@pytest.mark.parametrize("encoders", ENCODERS)
@pytest.mark.parametrize("share", [0.5, 0.0, 0.02], ids=["halves", "all and none", "one image"])
def test_two_processes_learn_what_one_does(encoders, share):
    slots, barrier = {}, threading.Barrier(2, timeout=30)

    def process(rank):
        def total(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            found = slots[0] + slots[1]
            barrier.wait()
            return found

        made = StreamStatistics(CLASSES, FEATURES, encoders)
        for task in range(3):
            parts = draw_task(task)
            order = torch.randperm(60, generator=torch.Generator().manual_seed(task))
            cut = round(60 * share)
            own = order[:cut] if rank else order[cut:]
            made.learn(*(part[own] for part in parts), total=total)
        return made

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert_same_bits(first, learned(encoders))
    assert_same_bits(first, second)


def test_a_task_that_cannot_be_learned_changes_nothing():
    found = learned(tasks=1)
    base, merged, labels, text = draw_task(1)
    damaged = merged.clone()
    damaged[3, 2] = math.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        found.learn(base, damaged, labels, text)
    with pytest.raises(InputError, match="encoders='both' need the merged model's features"):
        found.learn(base, None, labels, text)
    for wrong in (CLASSES, -1):
        stray = labels.clone()
        stray[0] = wrong
        with pytest.raises(InputError, match=r"labels from .* of 6 classes; expected 0 to 5"):
            found.learn(base, merged, stray, text)
    assert_same_bits(found, learned(tasks=1))


def test_an_unknown_name_of_encoders_is_told_with_the_nearest():
    with pytest.raises(InputError, match="unknown encoders 'bases'; did you mean 'base'"):
        StreamStatistics(CLASSES, FEATURES, "bases")


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.inf, math.nan])
def test_a_ridge_is_a_finite_number_above_zero(ridge):
    with pytest.raises(InputError, match=f"ridge={ridge}; expected a finite number above 0"):
        StreamStatistics(CLASSES, FEATURES, ridge=ridge)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"hold": -1.0}, "hold=-1.0; expected a finite number from 0"),
        ({"hold": math.nan}, "hold=nan; expected a finite number from 0"),
        ({"rank": -1}, "rank=-1; expected a whole number from 0"),
        ({"rank": 2.5}, "rank=2.5; expected a whole number from 0"),
    ],
    ids=str,
)
def test_hold_and_rank_are_checked(option, message):
    with pytest.raises(InputError, match=message):
        StreamStatistics(CLASSES, FEATURES, **option)


@pytest.mark.parametrize("encoders", ENCODERS)
def test_files_of_before_there_were_options_go_on_as_they_began(encoders, tmp_path):
    made = learned(encoders, tasks=2, ridge=2.0, hold=0.0, rank=0)
    made.save(tmp_path / "new.safetensors")
    tensors, metadata = load_tensors(tmp_path / "new.safetensors")
    kept = {name: metadata[name] for name in ("format", "encoders")}
    kept["ridge"] = "null" if encoders == "base" else "2.0"
    save_tensors(tmp_path / "old.safetensors", tensors, kept)
    found = StreamStatistics.load(tmp_path / "old.safetensors")
    assert found.options == {"ridge": 2.0, "hold": 0.0, "rank": 0}
    found.learn(*draw_task(2))
    assert_same_bits(found, learned(encoders, ridge=2.0, hold=0.0, rank=0))


def test_the_vote_of_a_file_without_losses_stays_until_the_next_task(tmp_path):
    made = learned("base", tasks=2)
    made.save(tmp_path / "new.safetensors")
    tensors, metadata = load_tensors(tmp_path / "new.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name != "losses"}
    save_tensors(tmp_path / "old.safetensors", tensors, metadata)
    found = StreamStatistics.load(tmp_path / "old.safetensors")
    assert found.vote == made.vote
    before = made.losses
    for statistics in (made, found):
        statistics.learn(*draw_task(2))
    assert torch.equal(found.losses, made.losses - before)
    assert found.vote == choose_vote(found.losses)


@pytest.mark.parametrize("encoders", ENCODERS)
def test_statistics_go_to_a_file_and_back_and_go_on_alike(encoders, tmp_path):
    made = learned(encoders, tasks=2, ridge=0.25, hold=0.125, rank=2)
    made.save(tmp_path / "kept.safetensors", {"model": "tiny", "format": "another"})
    found = StreamStatistics.load(tmp_path / "kept.safetensors")
    assert (found.encoders, found.tasks, found.vote) == (encoders, 2, made.vote)
    assert_same_bits(found, made)
    found.learn(*draw_task(2))
    assert_same_bits(found, learned(encoders, ridge=0.25, hold=0.125, rank=2))
    assert load_tensors(tmp_path / "kept.safetensors")[1]["model"] == "tiny"


def test_a_state_is_taken_over_as_a_copy():
    made = learned(tasks=2)
    found = StreamStatistics(CLASSES, FEATURES)
    found.load_state_dict(made.state_dict())
    made.learn(*draw_task(2))
    assert_same_bits(found, learned(tasks=2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: learned("base"), "no tensor 'carried.means'"),
        (lambda: StreamStatistics(4, FEATURES), r"'base.counts' are \[4\] .* expected \[6\]"),
        (lambda: StreamStatistics(CLASSES, 3), r"'base.sums' are \[6, 3\] .* expected \[6, 5\]"),
    ],
    ids=["encoders", "classes", "features"],
)
def test_a_state_of_other_statistics_is_refused_and_changes_nothing(other, message):
    found = learned(tasks=2)
    with pytest.raises(InputError, match=message):
        found.load_state_dict(other().state_dict())
    assert_same_bits(found, learned(tasks=2))


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def with_(**changes):
    return lambda tensors, metadata: metadata.update(changes)


def cut_tensor(tensors, metadata):
    tensors["base.products"] = tensors["base.products"][:2].clone()


def other_type(tensors, metadata):
    tensors["base.sums"] = tensors["base.sums"].float()


DAMAGES = {
    "foreign": (with_(format="pt"), "holds no class statistics"),
    "no sums": (without("base.sums"), "damaged class statistics"),
    "no vote": (without("vote"), "damaged class statistics"),
    "no map": (without("carried.weight"), "damaged class statistics"),
    "cut": (cut_tensor, r"damaged class statistics .*base.products"),
    "other type": (other_type, r"damaged class statistics .*base.sums"),
    "encoders": (with_(encoders="neither"), "damaged class statistics .*unknown encoders"),
    "no number": (with_(ridge="much"), "damaged class statistics"),
    "a text": (with_(ridge='"2"'), "damaged class statistics"),
    "below zero": (with_(ridge="-1"), "damaged class statistics .*ridge=-1"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_file_is_named(damage, message, tmp_path):
    file = tmp_path / "kept.safetensors"
    learned(tasks=1).save(file)
    tensors, metadata = load_tensors(file)
    tensors, metadata = dict(tensors), dict(metadata)
    damage(tensors, metadata)
    save_tensors(file, tensors, metadata)
    with pytest.raises(InputError, match=rf"kept\.safetensors: {message}"):
        StreamStatistics.load(file)


def test_a_cut_or_missing_file_is_named(tmp_path):
    file = tmp_path / "kept.safetensors"
    with pytest.raises(InputError, match=r"kept\.safetensors"):
        StreamStatistics.load(file)
    learned(tasks=1).save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"kept\.safetensors"):
        StreamStatistics.load(file)
