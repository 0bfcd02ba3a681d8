"""The figures over task vectors, against plain references that hold all of them in float64."""

import math
import weakref

import pytest
import torch

from cl_merge import analysis
from cl_merge.analysis import (
    direction_consistency,
    keep,
    origin,
    origin_counts,
    sign_conflict_curve,
    sign_conflicts,
)
from cl_merge.errors import InputError
from cl_merge.mergers import Merger, merge
from cl_merge.task_vectors.task_vector import TaskVector


def make_vector(seed, grid=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        if grid:  # few values: many zeros and equal magnitudes
            return torch.randint(-3, 4, shape, generator=generator) / 4.0
        return torch.randn(shape, generator=generator)

    return TaskVector(
        {
            "weight": normal(17, 5),
            "transposed": normal(9, 4).t(),
            "scalar": normal(),
            "empty": normal(0, 3),
            "double": normal(40).double(),
            "half": normal(11).half(),
        }
    )


def flat(vector):
    return torch.cat([tensor.reshape(-1).float() for tensor in vector.values()]).double()


def rows(vectors):
    return torch.stack([flat(vector) for vector in vectors])


def backwards(vector):
    return TaskVector({name: vector[name] for name in reversed(list(vector))})


def one(*values):
    return TaskVector({"weight": torch.tensor(values)})


@pytest.fixture(params=[1, 2, 5], ids=lambda tasks: f"{tasks} tasks")
def tasks(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["normal", "grid"])
def vectors(request, tasks):
    return [make_vector(10 * tasks + task, grid=request.param) for task in range(tasks)]


@pytest.fixture(params=[7, 1 << 18], ids=["small chunks", "one chunk"])
def any_chunk(request, monkeypatch):
    monkeypatch.setattr(Merger, "chunk_size", request.param)


# The pruning curve.


@pytest.mark.parametrize("grid", [False, True], ids=["normal", "grid"])
@pytest.mark.parametrize("share", [1e-9, 0.07, 0.2, 1 / 3, 0.5, 0.9, 1])
def test_highest_and_lowest_match_a_sort(share, grid):
    vector = make_vector(3, grid)
    values = flat(vector)
    number = max(1, round(share * len(values)))
    ascending = values.abs().sort().values
    highest = values * (values.abs() >= ascending[-number])
    lowest = values * (values.abs() <= ascending[number - 1])
    assert flat(keep(vector, share)).equal(highest)
    assert flat(keep(vector, share, "lowest")).equal(lowest)
    if not grid:
        assert int(highest.count_nonzero()) == int(lowest.count_nonzero()) == number


def test_random_keeps_about_the_share_and_larger_shares_keep_all_that_smaller_ones_do():
    vector = TaskVector({"a": torch.ones(150, 200), "b": torch.ones(20_000)})
    few, many = (flat(keep(vector, share, "random", seed=1)) for share in (0.2, 0.6))
    assert float(few.mean()) == pytest.approx(0.2, abs=0.01)
    assert float(many.mean()) == pytest.approx(0.6, abs=0.01)
    assert bool((few <= many).all())
    assert not few.equal(flat(keep(vector, 0.2, "random", seed=2)))
    assert keep(vector, 1.0, "random") == vector


@pytest.mark.parametrize("which", ["highest", "lowest", "random"])
def test_what_is_kept_does_not_depend_on_the_order_of_the_parameters(which):
    vector = make_vector(4, grid=True)
    assert keep(vector, 0.3, which) == keep(backwards(vector), 0.3, which)


@pytest.mark.parametrize("which", ["highest", "lowest", "random"])
def test_what_is_kept_is_a_new_float32_vector_with_the_same_metadata(which):
    vector = TaskVector(make_vector(5), {"task": "birds"})
    before = flat(vector).clone()
    kept = keep(vector, 1, which)
    assert kept.metadata == {"task": "birds"}
    assert list(kept) == list(vector)
    for name, tensor in kept.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == vector[name].shape
        tensor.fill_(9)
    assert flat(vector).equal(before)


def test_a_vector_without_entries_stays_as_it_is():
    empty = TaskVector({"weight": torch.zeros(0, 2)})
    for which in analysis.KEPT:
        assert keep(empty, 0.5, which) == empty


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan, True, "0.2", None])
def test_a_wrong_share_is_refused(share):
    with pytest.raises(InputError) as error:
        keep(one(1.0), share)
    assert str(error.value) == f"share must be a number above 0 and at most 1, not {share!r}"


def test_an_unknown_choice_names_the_nearest():
    with pytest.raises(InputError) as error:
        keep(one(1.0), 0.5, "high")
    assert str(error.value) == (
        "unknown choice of entries 'high'; did you mean 'highest'? Known: highest, lowest, random"
    )


def test_values_that_float32_cannot_hold_are_refused():
    with pytest.raises(InputError, match=r"^the task vector: NaN or infinity in weight"):
        keep(one(1.0, math.nan), 0.5)
    with pytest.raises(InputError, match=r"^the task vector: NaN or infinity in weight"):
        keep(TaskVector({"weight": torch.tensor([1e300, 1.0], dtype=torch.float64)}), 0.5)


# Sign conflicts.


def naive_sign_conflicts(values, density):
    size = values.shape[1]
    rank = size - int(density * size)
    if rank:
        values = values * (values.abs() >= values.abs().kthvalue(rank, 1, keepdim=True).values)
    counting = conflicting = 0
    for column in values.t().tolist():
        counting += any(column)
        conflicting += min(column) < 0 < max(column)
    return conflicting / counting


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1])
def test_sign_conflicts_match_a_count_by_element(vectors, density):
    expected = naive_sign_conflicts(rows(vectors), density)
    assert sign_conflicts(iter(vectors), density) == expected


@pytest.mark.usefixtures("any_chunk")
def test_the_curve_holds_the_conflicts_among_the_first_vectors(vectors):
    expected = [sign_conflicts(vectors[:count], 0.3) for count in range(1, len(vectors) + 1)]
    assert sign_conflict_curve(iter(vectors), 0.3) == expected


def test_opposite_vectors_are_all_conflict_and_equal_ones_none():
    vector = make_vector(6)
    assert sign_conflicts([vector, -vector]) == 1.0
    assert sign_conflicts([vector, vector]) == 0.0


def test_disjoint_choices_are_no_conflict():
    assert sign_conflicts([one(5.0, 4.0, -0.1, 0.1), one(-0.1, 0.1, 5.0, 4.0)], 0.25) == 0.0


def test_there_is_no_share_of_conflicts_among_zeros():
    assert math.isnan(sign_conflicts([one(0.0, 0.0), one(0.0, 0.0)]))


@pytest.mark.parametrize("density", [0, 1.5, "all"])
def test_a_wrong_density_is_refused(density):
    with pytest.raises(InputError) as error:
        sign_conflicts([one(1.0)], density)
    assert str(error.value) == f"density must be a number above 0 and at most 1, not {density!r}"


# Direction consistency.


def naive_direction_consistency(values, bins, sequential):
    before = torch.cat([torch.zeros_like(values[:1]), values[:-1]])
    updates = values - before if sequential else values
    moved = (updates != 0).sum(0)
    entries = sorted(
        (abs(max(column, key=abs)), abs(signs) / number)
        for column, signs, number in zip(
            values.t().tolist(), updates.sign().sum(0).tolist(), moved.tolist(), strict=True
        )
        if any(column)
    )
    upper = [entries[round(i * len(entries) / bins) - 1][0] for i in range(1, bins + 1)]
    members = [[] for _ in upper]
    for magnitude, consistency in entries:
        members[next(i for i, limit in enumerate(upper) if magnitude <= limit)].append(consistency)
    means = [sum(found) / len(found) if found else math.nan for found in members]
    return upper, [len(found) for found in members], means


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "independent"])
@pytest.mark.parametrize("bins", [1, 3, 10])
def test_direction_consistency_matches_a_loop_over_elements(vectors, bins, sequential):
    result = direction_consistency(iter(vectors), bins, sequential)
    upper, counts, means = naive_direction_consistency(rows(vectors), bins, sequential)
    assert list(result.upper) == upper
    assert list(result.counts) == counts
    # The consistency of an element is rounded to float32.
    assert list(result.consistency) == pytest.approx(means, rel=1e-6, nan_ok=True)


def test_continual_growth_is_consistent_and_a_turn_is_not():
    growth = [one(1.0, -2.0), one(1.5, -3.0), one(9.0, -3.5)]
    assert direction_consistency(growth, bins=1).consistency == (1.0,)
    # Moved back: the second vector has the first one's sign, but the update does not.
    turn = [one(2.0), one(1.0)]
    assert direction_consistency(turn, bins=1).consistency == (0.0,)
    assert direction_consistency(turn, bins=1, sequential=False).consistency == (1.0,)


def test_tasks_that_leave_an_entry_alone_do_not_count():
    still = [one(1.0, 0.0), one(1.0, 0.0), one(2.0, 0.0)]
    result = direction_consistency(still, bins=1)
    assert result.counts == (1,)
    assert result.consistency == (1.0,)


def test_equal_magnitudes_share_a_bin_and_the_others_may_be_empty():
    result = direction_consistency([one(1.0, -1.0, 1.0, 1.0, 5.0, 0.0)], bins=4)
    assert result.upper == (1.0, 1.0, 1.0, 5.0)
    assert result.counts == (4, 0, 0, 1)
    assert result.consistency == pytest.approx((1, math.nan, math.nan, 1), nan_ok=True)


def test_entries_that_no_task_moved_are_in_no_bin():
    result = direction_consistency([one(0.0, 0.0)], bins=2)
    assert result.counts == (0, 0)
    assert all(math.isnan(value) for value in result.consistency)


@pytest.mark.parametrize("bins", [0, -1, 2.0, True, "ten"])
def test_wrong_bins_are_refused(bins):
    with pytest.raises(InputError) as error:
        direction_consistency([one(1.0)], bins)
    assert str(error.value) == f"bins must be a whole number above 0, not {bins!r}"


# Origins.


@pytest.mark.usefixtures("any_chunk")
def test_origins_match_a_loop_over_elements_and_lead_back_to_the_merge(vectors):
    shares = origin(iter(vectors))
    merged = merge(vectors)
    assert list(shares) == list(merged)
    for name, found in shares.items():
        stack = torch.stack([vector[name].reshape(-1).double() for vector in vectors])
        counts = [0] * len(vectors)
        for column in stack.t().tolist():
            if any(column):
                counts[max(range(len(column)), key=lambda t, c=column: (abs(c[t]), t))] += 1
        assert found == pytest.approx([count / max(1, sum(counts)) for count in counts])


def test_counts_of_origins_make_the_shares_and_leave_out_what_no_task_moved():
    first, second = one(3.0, -1.0, 2.0, 0.0), one(1.0, 4.0, -2.0, 0.0)
    assert origin_counts([first, second]) == {"weight": [1, 2]}
    assert origin([first, second])["weight"] == [1 / 3, 2 / 3]


def test_zeros_are_no_ones_and_equal_magnitudes_the_later_tasks():
    first = TaskVector({"frozen": torch.zeros(3), "moved": torch.tensor([2.0, 0.0, 1.0])})
    second = TaskVector({"frozen": torch.zeros(3), "moved": torch.tensor([-2.0, 0.0, 0.5])})
    assert origin([first, second]) == {"frozen": [0.0, 0.0], "moved": [0.5, 0.5]}


# What all that take several vectors share.


@pytest.fixture(
    params=[sign_conflicts, sign_conflict_curve, direction_consistency, origin],
    ids=lambda f: f.__name__,
)
def figure(request):
    return request.param


def test_no_vector_is_an_error(figure):
    with pytest.raises(InputError, match=r"^nothing to analyse: no task vector was given$"):
        figure(iter([]))


def test_vectors_of_other_shapes_are_named(figure):
    with pytest.raises(
        InputError, match=r"^task 1 \(the 2nd\) has other shapes .*weight \(1,\) instead of"
    ):
        figure([one(1.0, 2.0), one(1.0)])


def test_nan_is_named(figure):
    with pytest.raises(InputError, match=r"^task 1 \(the 2nd\): NaN or infinity in weight"):
        figure([one(1.0), one(math.nan)])


def test_one_vector_is_held_at_a_time_and_none_is_changed(figure):
    held = []

    def stream():
        for task in range(4):
            assert not any(reference() for reference in held)
            vector = make_vector(task)
            held.append(weakref.ref(vector))
            before = flat(vector).clone()
            yield vector
            assert flat(vector).equal(before)
            del vector

    figure(stream())


def test_order_of_parameters_does_not_matter(figure):
    vectors = [make_vector(task) for task in range(3)]
    first, second = figure(vectors), figure(map(backwards, vectors))
    if figure is direction_consistency:  # sums in float64 are rounded in another order
        assert first.counts == second.counts
        assert first.consistency == pytest.approx(second.consistency)
    else:
        assert first == second
