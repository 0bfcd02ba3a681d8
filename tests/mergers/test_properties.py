"""What holds for any task vectors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merger_cases import ANY_NUMBER, CHANGING_ONE, DROPPING_NOTHING

from cl_merge.kernels.random_bits import random_bits
from cl_merge.merge_files.work import new_state
from cl_merge.mergers import RandomMix, get_merger, merge
from cl_merge.mergers.base import fold_chunk
from cl_merge.mergers.chunks import Reader, ResultInfo
from cl_merge.seeds import derive_seed

ORDER_FREE = ["average", "task-arithmetic", "ties"]
EXACT = st.integers(-64, 64).map(lambda n: n / 16)  # sums of these are exact: order may not matter
FLOAT = st.floats(-(2.0**99), 2.0**99, width=32)
LAYOUT = st.dictionaries(
    st.text(min_size=1, max_size=3),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    min_size=1,
    max_size=4,
)
METHODS = pytest.mark.parametrize("method", ANY_NUMBER)


@st.composite
def vectors(draw, elements=FLOAT, min_tasks=1, max_tasks=5):
    layout = draw(LAYOUT)
    count = draw(st.integers(min_tasks, max_tasks))

    def tensor(shape):
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(elements, min_size=size, max_size=size))).view(shape)

    return [{name: tensor(shape) for name, shape in layout.items()} for _ in range(count)]


def same_bits(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)) for name in one
    )


@pytest.mark.parametrize("method", sorted({*ANY_NUMBER, "slerp"} - CHANGING_ONE))
@given(vectors=vectors(min_tasks=1, max_tasks=1))
def test_merging_one_task_returns_it(method, vectors):
    options = DROPPING_NOTHING.get(method, {})
    (vector,) = vectors
    merged = merge(vectors, method, **options)
    assert list(merged) == list(vector)
    assert all(torch.equal(merged[name], vector[name]) for name in vector)


@METHODS
@given(vectors=vectors(), chunk=st.integers(1, 9))
def test_the_chunk_size_changes_no_bit(method, vectors, chunk):
    whole = merge(vectors, method)
    merger = get_merger(method)
    merger.chunk_size = chunk
    assert same_bits(whole, merge(vectors, merger))


@METHODS
@given(vectors=vectors(), data=st.data())
def test_the_order_of_parameters_changes_no_bit(method, vectors, data):
    shuffled = [
        {name: vector[name] for name in data.draw(st.permutations(list(vector)))}
        for vector in vectors
    ]
    assert same_bits(merge(vectors, method), merge(shuffled, method))


@pytest.mark.parametrize("method", ORDER_FREE)
@given(vectors=vectors(elements=EXACT), data=st.data())
def test_the_order_of_tasks_does_not_matter(method, vectors, data):
    shuffled = data.draw(st.permutations(vectors))
    assert merge(vectors, method) == merge(shuffled, method)


@given(vectors=vectors(), data=st.data())
def test_the_order_of_tasks_does_not_change_the_largest_magnitude(vectors, data):
    one, two = merge(vectors), merge(data.draw(st.permutations(vectors)))
    assert all(torch.equal(one[name].abs(), two[name].abs()) for name in one)


@given(vectors=vectors(min_tasks=1, max_tasks=1))
def test_on_equal_magnitude_the_later_task_wins(vectors):
    (vector,) = vectors
    opposite = {name: -tensor for name, tensor in vector.items()}
    assert same_bits(merge([vector, opposite]), opposite)
    assert same_bits(merge([opposite, vector]), vector)


@given(vectors=vectors(), times=st.integers(1, 4))
def test_merging_equal_vectors_by_magnitude_returns_them(vectors, times):
    assert same_bits(merge(vectors[:1] * times), vectors[0])
    assert same_bits(merge(vectors * times), merge(vectors))


@given(vectors=vectors(elements=EXACT))
def test_flipping_all_signs_flips_the_result(vectors):
    flipped = [{name: -tensor for name, tensor in vector.items()} for vector in vectors]
    for method in ANY_NUMBER:
        assert merge(flipped, method) == -merge(vectors, method)


@given(vectors=vectors(min_tasks=2))
def test_random_mix_takes_every_value_from_one_of_the_tasks(vectors):
    merged = merge(vectors, "random-mix")
    for name, tensor in merged.items():
        from_task = torch.stack([vector[name] == tensor for vector in vectors])
        assert bool(from_task.any(dim=0).all())


@pytest.mark.slow
@METHODS
@given(vectors=vectors())
def test_a_rule_may_be_driven_one_chunk_at_a_time_over_all_tasks(method, vectors):
    """As files will be merged: no accumulator is larger than a chunk."""
    merger = get_merger(method)
    prepared = [merger.prepare(Reader.of(vector)) for vector in vectors]
    parts = {}
    for name, tensor in vectors[0].items():
        step = 2 if merger.unit == "element" else max(tensor.numel(), 1)
        for start in range(0, tensor.numel(), step):
            part = slice(start, min(start + step, tensor.numel()))
            state = parts[name, start] = {}
            for task, (vector, of_task) in enumerate(zip(vectors, prepared, strict=True)):
                state |= new_state(merger, task, tensor.shape, part.stop - start)
                fold_chunk(merger, state, Reader.of(vector), (name, part), task, of_task)
    total = sum(merger.global_count(state)[0] for state in parts.values())
    expected = merge(vectors, method)
    for (name, start), state in parts.items():
        for count in (total,) if merger.global_count(state)[1] else (total, 0):
            found = torch.zeros_like(next(iter(state.values())))
            info = ResultInfo(name, vectors[0][name].shape, start, len(vectors), count)
            merger.compute(state, found, info)
            want = expected[name].reshape(-1)[start : start + len(found)]
            assert torch.equal(found, want)


def test_random_mix_is_uniform_over_tasks():
    tasks, size = 10, 20_000
    merged = merge(({"w": torch.full((size,), float(t))} for t in range(tasks)), "random-mix")
    counts = torch.bincount(merged["w"].long(), minlength=tasks)
    assert chi_square(counts) < 40  # 9 degrees of freedom: exceeded once in 10^5 draws


def test_random_mix_draws_neighbouring_elements_and_parameters_independently():
    size = 40_000
    merged = merge(
        ({n: torch.full((size,), float(t)) for n in "ab"} for t in range(2)), "random-mix"
    )
    neighbours = 2 * merged["a"][:-1] + merged["a"][1:]
    parameters = 2 * merged["a"] + merged["b"]
    for pairs in (neighbours, parameters):
        assert chi_square(torch.bincount(pairs.long(), minlength=4)) < 26  # 3 degrees: 1 in 10^5


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_random_mix_depends_on_the_seed():
    ones, twos = ({"w": torch.full((1000,), value)} for value in (1.0, 2.0))
    results = [merge([ones, twos], "random-mix", seed=seed)["w"] for seed in (0, 1, 0)]
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_random_numbers_are_the_same_everywhere_for_ever():
    # A change here changes what users get from the same seed.
    key = derive_seed(0, "weight", 1)
    assert key == -9146296286469352502 % 2**64
    assert random_bits(key, 7, 2, torch.device("cpu")).tolist() == [
        1125078269869176869,
        5855721695076329053,
    ]


def test_random_numbers_use_all_bits_evenly():
    bits = random_bits(derive_seed(0), 0, 1 << 14, torch.device("cpu"))
    assert bool((bits >= 0).all())
    for position in range(63):
        ones = int((bits >> position & 1).sum())
        assert abs(ones - (1 << 13)) < 5 * 64  # five standard deviations


@pytest.mark.parametrize("name", ["a", "b"])
def test_random_mix_of_later_tasks_keeps_what_earlier_ones_settled(name):
    vectors = [{name: torch.full((500,), float(task))} for task in range(6)]
    merger = RandomMix()
    results = []
    for vector in vectors:
        merger.update(vector)
        results.append(merger.merged()[name])
    for task, (before, after) in enumerate(itertools.pairwise(results), start=1):
        changed = before != after
        assert bool((after[changed] == task).all())
        assert float(changed.float().mean()) == pytest.approx(1 / (task + 1), abs=0.1)
