"""Each merger against an independent reference: a stack of whole vectors, in float64."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from cl_merge.mergers import (
    Average,
    MaxMagnitude,
    RandomMix,
    TaskArithmetic,
    Ties,
    merge,
    reference,
)
from cl_merge.mergers.chunks import Reader
from cl_merge.mergers.threshold import trim_threshold

pytestmark = pytest.mark.usefixtures("any_chunk")


def stack(vectors):
    """Flatten vectors into one matrix [T, d] in float64, parameters in the order of their names."""
    return torch.stack(
        [
            torch.cat([vector[name].reshape(-1).float() for name in sorted(vector)]).double()
            for vector in vectors
        ]
    )


def draws(vectors, seed):
    """SplitMix64 in Python's own integers, as numbers from 0 to 1: [T, d], as in `stack`."""
    return torch.tensor(
        [
            [
                (splitmix64(key_of(seed, name, task), i) >> 1) / 2**63
                for name in sorted(vector)
                for i in range(vector[name].numel())
            ]
            for task, vector in enumerate(vectors)
        ],
        dtype=torch.float64,
    )


def key_of(seed, name, task):
    text = json.dumps([seed, name, task]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def splitmix64(key, counter):
    state = (key + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def check(merger, vectors, expected, tolerance):
    for vector in vectors:
        merger.update(vector)
    merged = merger.merged()
    assert list(merged) == list(vectors[0])
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == vectors[0][name].shape
        assert tensor.is_contiguous()
    torch.testing.assert_close(stack([merged])[0], expected, rtol=tolerance, atol=tolerance)


def test_max_magnitude_equals_the_reference_exactly(vectors):
    check(MaxMagnitude(), vectors, reference.magmax(stack(vectors)), tolerance=0)


def test_average_matches_the_reference(vectors):
    check(Average(), vectors, reference.average(stack(vectors)), tolerance=1e-6)


def test_task_arithmetic_matches_the_reference(vectors):
    check(TaskArithmetic(), vectors, reference.task_arithmetic(stack(vectors)), tolerance=2e-6)


@pytest.mark.parametrize("seed", [0, 5, -1, 2**70])
def test_random_mix_equals_the_reference_exactly(vectors, seed):
    expected = reference.random_mix(stack(vectors), draws(vectors, seed))
    check(RandomMix(seed=seed), vectors, expected, tolerance=0)


@pytest.mark.parametrize("density", [1e-9, 0.05, 0.2, 0.5, 0.999, 1.0])
def test_ties_matches_the_reference(vectors, density):
    expected = reference.ties(stack(vectors), density)
    check(Ties(density=density), vectors, expected, tolerance=1e-6)


def test_zero_sums_take_the_sign_of_the_majority_over_all_parameters():
    first = {"few": torch.tensor([2.0]), "many": torch.tensor([-1.0, -1.0])}
    second = {"few": torch.tensor([-2.0]), "many": torch.tensor([-1.0, 3.0])}
    # Signs of the sums are 0, -1, 1: no majority, so the zero sum elects no value.
    assert merge([first, second], "ties", density=1)["few"].tolist() == [0]
    second["many"] = torch.tensor([-1.0, -1.0])
    assert merge([first, second], "ties", density=1)["few"].tolist() == [-2]
    assert merge([_negative(first), _negative(second)], "ties", density=1)["few"].tolist() == [2]


def _negative(vector):
    return {name: -tensor for name, tensor in vector.items()}


def test_each_vector_is_trimmed_by_its_own_threshold_over_all_parameters():
    small = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.3, 0.4])}
    large = {"a": torch.tensor([40.0, 30.0]), "b": torch.tensor([20.0, 10.0])}
    merged = merge([small, large], "ties", density=0.25)  # keeps 1 + 1 of 4
    assert merged["a"].tolist() == [40, 30]
    assert merged["b"].tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["normal", "zeros", "mostly zeros", "equal", "subnormal", "huge"])
def test_the_threshold_is_the_exact_kth_magnitude(kind, density):
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    values = {
        "normal": values,
        "zeros": torch.zeros(50),
        "mostly zeros": values * (values > 1.5),
        "equal": torch.full((50,), -0.1),
        "subnormal": values * 1e-42,
        "huge": values * 1e37,
    }[kind]
    rank = len(values) - int(density * len(values))
    expected = values.abs().kthvalue(rank).values.item()
    assert trim_threshold(Reader.of({"values": values}), density) == expected


def test_the_threshold_of_a_single_value_is_its_magnitude():
    assert trim_threshold(Reader.of({"w": torch.tensor([-3.0])}), 0.2) == 3.0


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_an_empty_vector_has_threshold_zero(density):
    assert trim_threshold(Reader.of({}), density) == 0.0


def test_the_documentation_shows_the_reference_as_it_is(vectors):
    page = Path(__file__).parents[2] / "docs/concepts/one_task.md"
    shown = {"torch": torch}
    exec(page.read_text().split("```python\n")[-1].split("```")[0], shown)
    rows = stack(vectors)
    assert torch.equal(shown["magmax"](rows), reference.magmax(rows))
    for density in (0.2, 1.0):
        assert torch.equal(shown["ties"](rows, density), reference.ties(rows, density))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_trims_each_parameter_by_itself_if_asked_to(density):
    vectors = [{n: torch.randn(9, 7, dtype=torch.float64).float() for n in "abc"} for _ in range(3)]
    vectors = [{n: t * (1 + i) for i, (n, t) in enumerate(v.items())} for v in vectors]
    found = merge(vectors, "ties", density=density, per_parameter=True)
    for name in "abc":
        trimmed = torch.stack([vector[name].double().flatten() for vector in vectors])
        for row in trimmed:
            row[row.abs() < row.abs().sort().values[63 - int(density * 63)]] = 0
        sign = trimmed.sum(dim=0).sign()
        agree = (trimmed.sign() == sign) & (trimmed != 0)
        mean = (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
        torch.testing.assert_close(found[name].flatten().double(), mean, rtol=1e-6, atol=1e-7)
    whole = merge(vectors, "ties", density=density)
    assert (density == 1) == all(torch.equal(whole[name], found[name]) for name in "abc")
