"""Mergers that drop, elect, weigh and compare, each against the reference in float64."""

import hashlib
import json
import math

import pytest
import torch

from cl_merge.errors import InputError
from cl_merge.mergers import get_merger, merge, reference

pytestmark = pytest.mark.usefixtures("any_chunk")
NOTHING = torch.zeros(0, dtype=torch.float64)


def flat(vectors, name):
    """One parameter of all tasks, [T, n] in float64."""
    return torch.stack([vector[name].reshape(-1).float().double() for vector in vectors])


def draws(vectors, name, seed):
    """SplitMix64 in Python's own integers, as numbers from 0 to 1, [T, n]."""
    return torch.tensor(
        [
            [draw(seed, name, task, i) for i in range(vector[name].numel())]
            for task, vector in enumerate(vectors)
        ],
        dtype=torch.float64,
    )


def draw(seed, name, task, index):
    text = json.dumps([seed, name, task]).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    state = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return ((state ^ (state >> 31)) >> 1) / 2**63


def elected(stacks):
    """Elect and merge parameters [T, n] by name: the majority is that of all of them together."""
    stack = torch.cat(list(stacks.values()), dim=1)
    merged = reference.merge_elected(stack, reference.elect_sign(stack))
    sizes = [stack.shape[1] for stack in stacks.values()]
    return dict(zip(stacks, merged.split(sizes), strict=True))


def check(method, vectors, expected, tolerance=1e-5, **options):
    merged = merge(vectors, method, **options)
    assert list(merged) == list(vectors[0])
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == vectors[0][name].shape
        torch.testing.assert_close(
            tensor.reshape(-1).double(), expected[name], rtol=tolerance, atol=tolerance
        )


@pytest.fixture(params=[1, 2, 5], ids=lambda tasks: f"{tasks} tasks")
def tasks(request):
    return request.param


@pytest.mark.parametrize(("density", "seed"), [(0.5, 0), (0.1, 7), (1.0, 0)])
def test_dare_drops_rescales_and_sums(vectors, density, seed):
    expected = {
        name: reference.dare(flat(vectors, name), density, draws(vectors, name, seed))
        for name in vectors[0]
    }
    check("dare", vectors, expected, density=density, seed=seed)


def test_dare_ties_drops_rescales_and_elects(vectors):
    # A power of two: dividing by it is exact, and so are the sums of the grid that cancel.
    kept = {
        name: reference.keep_and_rescale(
            flat(vectors, name), draws(vectors, name, seed=3) < 0.5, 0.5
        )
        for name in vectors[0]
    }
    check("dare-ties", vectors, elected(kept), density=0.5, seed=3)


@pytest.mark.slow
def test_dare_keeps_the_mean():
    ones = {"w": torch.ones(40_000)}
    for method in ("dare", "dare-ties"):
        merged = merge([ones], method, density=0.2)["w"]
        assert set(merged.unique().tolist()) == {0.0, 5.0}
        assert float(merged.mean()) == pytest.approx(1, abs=0.05)  # five standard deviations


def test_dare_draws_anew_for_each_task_parameter_and_seed():
    ones = {"a": torch.ones(1000), "b": torch.ones(1000)}
    first = merge([ones], "dare", density=0.5)
    second = merge([{n: 0 * t for n, t in ones.items()}, ones], "dare", density=0.5)
    other = merge([ones], "dare", density=0.5, seed=1)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], second["a"])
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 0.1), (0.85, 0.007), (0.0, 0.3), (0.3, 0.0)])
def test_breadcrumbs_leaves_out_both_ends_of_each_parameter(vectors, beta, gamma):
    expected = {
        name: reference.breadcrumbs(flat(vectors, name), beta, gamma)
        for name, tensor in vectors[0].items()
        if tensor.numel()
    }
    check("breadcrumbs", vectors, {"empty": NOTHING} | expected, beta=beta, gamma=gamma)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.5), (0.4, 0.2), (1.0, 0.0)])
def test_della_drops_by_rank_within_rows_and_elects(vectors, density, epsilon):
    kept = {}
    for name, tensor in vectors[0].items():
        row = tensor.numel() if tensor.ndim < 2 else tensor.numel() // max(len(tensor), 1)
        stack = flat(vectors, name)
        drop = reference.drop_probability(stack, density, epsilon, max(row, 1))
        stays = draws(vectors, name, seed=2) >= drop
        # Rounded to float32, as the merger does before it adds up: sums may cancel.
        kept[name] = reference.keep_and_rescale(stack, stays, 1 - drop).float().double()
    check("della", vectors, elected(kept), density=density, epsilon=epsilon, seed=2)


def test_the_rules_that_drop_and_elect_are_put_together_of_the_same_parts(make_vector):
    vectors = [{"w": make_vector(seed)["weight"]} for seed in range(4)]
    stack, drawn = flat(vectors, "w"), draws(vectors, "w", seed=0)
    check("dare-ties", vectors, {"w": reference.dare_ties(stack, 0.5, drawn)}, density=0.5)
    check("della", vectors, {"w": reference.della(stack, 0.4, 0.2, drawn, row=5)})


def test_della_drops_small_values_more_often():
    values = torch.linspace(1, 0.001, 500).expand(200, 500)
    merged = merge([{"w": values}], "della", density=0.5, epsilon=0.8)["w"]
    kept = (merged != 0).float().mean(dim=0)
    assert float(kept[:50].mean()) == pytest.approx(0.86, abs=0.02)
    assert float(kept[-50:].mean()) == pytest.approx(0.14, abs=0.02)
    assert float(merged.mean() / values.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("threshold", "least"), [(0.4, 2), (1.0, 1), (0.2, 3)])
def test_consensus_keeps_what_enough_tasks_use(vectors, threshold, least):
    expected = {
        name: reference.consensus(flat(vectors, name), threshold, least) for name in vectors[0]
    }
    check("consensus", vectors, expected, threshold=threshold, least=least)


def test_emr_takes_the_largest_value_of_the_elected_sign(vectors):
    expected = {name: reference.emr(flat(vectors, name)) for name in vectors[0]}
    check("emr", vectors, expected, tolerance=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_the_moving_average_forgets_exponentially(vectors, decay):
    expected = {name: reference.ema(flat(vectors, name), decay) for name in vectors[0]}
    check("ema", vectors, expected, decay=decay)


def test_the_fisher_average_weighs_each_element(vectors, make_vector):
    fishers = [
        {name: tensor.float().square() * 1e-30 for name, tensor in make_vector(90 + task).items()}
        for task in range(len(vectors))
    ]
    for fisher in fishers:
        fisher["weight"][:3] = 0  # important to none
    merger = get_merger("fisher")
    for vector, fisher in zip(vectors, fishers, strict=True):
        merger.update(vector, fisher)
    for name, merged in merger.items():
        want = reference.fisher(flat(vectors, name), flat(fishers, name))
        torch.testing.assert_close(merged.reshape(-1).double(), want, rtol=1e-6, atol=1e-6)


def test_an_importance_is_needed_by_those_that_weigh_and_by_no_other():
    vector = {"w": torch.ones(2)}
    with pytest.raises(
        InputError, match=r"task 0 \(the 1st\): 'fisher' needs the importance of each element"
    ):
        get_merger("fisher").update(vector)
    with pytest.raises(
        InputError, match=r"task 0 \(the 1st\): 'magmax' takes no importance; leave it out"
    ):
        get_merger("magmax").update(vector, vector)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"w": torch.tensor([1.0, -1.0])}, "is negative in w; expected 0 or more"),
        ({"w": torch.tensor([1.0, math.nan])}, "NaN or infinity in w"),
        ({"w": torch.ones(3)}, "has other shapes than the task vector"),
        ({"v": torch.ones(2)}, "has other tensors than the task vector"),
    ],
)
def test_a_bad_importance_is_named_and_nothing_is_folded(importance, message):
    merger = get_merger("fisher")
    with pytest.raises(InputError) as caught:
        merger.update({"w": torch.ones(2)}, importance)
    assert str(caught.value).startswith("the importance of task 0")
    assert message in str(caught.value)
    assert merger.tasks == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dare", {"density": 0}, "density must be a number above 0 and at most 1, not 0"),
        ("dare-ties", {"seed": 0.5}, "seed must be a whole number, not 0.5"),
        ("breadcrumbs", {"beta": -0.1}, "beta must be a number from 0 to 1, not -0.1"),
        (
            "breadcrumbs",
            {"beta": 0.6, "gamma": 0.4},
            "beta=0.6 and gamma=0.4 leave nothing; expected less than 1 together",
        ),
        ("della", {"epsilon": math.nan}, "epsilon must be a number from 0 to 1, not nan"),
        (
            "della",
            {"density": 0.1, "epsilon": 0.3},
            "density=0.1 and epsilon=0.3 make probabilities from 0.75 to 1.05 to drop a value; "
            "expected 0 or more, and below 1",
        ),
        ("consensus", {"least": 0}, "least must be a whole number of 1 or more, not 0"),
        ("ema", {"decay": 10**400}, f"decay must be a number from 0 to 1, not {10**400}"),
        (
            "consensus",
            {"threshold": 10**400},
            f"threshold must be a number from 0 to inf, not {10**400}",
        ),
        ("consensus", {"threshold": "1"}, "threshold must be a number from 0 to inf, not '1'"),
        ("ema", {"decay": 1.5}, "decay must be a number from 0 to 1, not 1.5"),
    ],
)
def test_an_option_out_of_range_is_an_error(method, options, message):
    with pytest.raises(InputError) as caught:
        get_merger(method, **options)
    assert str(caught.value) == message
