"""TIES and its kin, whatever elects a sign, is done with what agrees, and stays of each task."""

import pytest
import torch
from file_cases import in_memory, read, same_bits, write

from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import get_merger, merge

SHAPES = {"matrix": (13, 9), "row": (31,), "single": (1,), "scalar": ()}
KIN = {
    "ties": {"density": 1},
    "dare-ties": {"density": 1},
    "della": {"density": 1, "epsilon": 0},
}
WEIGHTS = [0.5, -1.5, 2.0, 0.0]


def vectors(seed, tasks=4):
    """Task vectors: half of the values of few magnitudes, so that signs are often tied."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape):
        values = torch.randn(shape, generator=generator)
        few = torch.randint(-2, 3, shape, generator=generator) / 2
        return torch.where(torch.rand(shape, generator=generator) < 0.5, values, few)

    return [{name: one(shape) for name, shape in SHAPES.items()} for _ in range(tasks)]


def elected(values, sign, combine, weights):
    """The rule on one parameter, float64 [T, ...], in loops; ``sign="value"`` without ties."""
    weights = [1.0] * len(values) if weights is None else weights
    values = [value.double().flatten() * w for value, w in zip(values, weights, strict=True)]
    out = torch.zeros_like(values[0])
    for i in range(len(out)):
        here = [(float(value[i]), w) for value, w in zip(values, weights, strict=True)]
        signs = [(value > 0) - (value < 0) for value, _ in here]
        if sign == "value":
            total = sum(value for value, _ in here)
            winner = (total > 0) - (total < 0)
        else:
            winner = 1 if sum(signs) >= 0 else -1
        agree = [
            each
            for each, own in zip(here, signs, strict=True)
            if own != 0 and (sign == "none" or own == winner)
        ]
        divisor = sum(w for _, w in agree) if combine == "mean" else 1
        out[i] = sum(value for value, _ in agree) / (divisor or 1)
    return out


@pytest.mark.parametrize("method", KIN)
@pytest.mark.parametrize("sign", ["value", "count", "none"])
@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_every_election_matches_one_in_loops(method, sign, combine, weights, any_chunk):
    stack = vectors(0)
    if sign == "value":  # tied sums take the majority of all elements, which has a test of its own
        generator = torch.Generator().manual_seed(1)
        stack = [
            {n: t + torch.rand(t.shape, generator=generator) / 1e3 * (t != 0) for n, t in v.items()}
            for v in stack
        ]
    options = {"sign": sign, "combine": combine, "task_weights": weights}
    found = merge(stack, method, **KIN[method], **options)
    for name in SHAPES:
        expected = elected([vector[name] for vector in stack], sign, combine, weights)
        torch.testing.assert_close(found[name].flatten().double(), expected, rtol=2e-5, atol=1e-6)


def test_equal_weights_leave_a_mean_as_it_is_and_multiply_a_sum():
    stack = vectors(2)
    plain, weighted = ({"density": 0.4, "task_weights": w} for w in (None, [3.0] * 4))
    for combine, factor in (("mean", 1), ("sum", 3)):
        one, other = (merge(stack, "ties", combine=combine, **o) for o in (plain, weighted))
        for name in SHAPES:
            torch.testing.assert_close(one[name] * factor, other[name])


def largest(tensor, count):
    """A vector with only its largest values, float64; no two may be equal."""
    flat = tensor.double().flatten()
    kept = torch.zeros_like(flat)
    for index in flat.abs().argsort(descending=True)[:count]:
        kept[index] = flat[index]
    return kept


@pytest.mark.parametrize("density", [0.3, [0.9, 0.01, 0.5], [1, 0.5, 0.2]])
def test_exactly_the_density_of_each_parameter_stays_of_each_task_but_one_value_at_least(density):
    stack = [{n: torch.randn(s) for n, s in SHAPES.items()} for _ in range(3)]
    found = merge(stack, "ties", density=density, per_parameter=True, sign="none", combine="sum")
    shares = density if isinstance(density, list) else [density] * 3
    for name in SHAPES:
        size = stack[0][name].numel()
        rows = [
            largest(vector[name], max(1, int(share * size)))
            for vector, share in zip(stack, shares, strict=True)
        ]
        torch.testing.assert_close(found[name].flatten().double(), sum(rows), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "della"])
def test_a_list_of_densities_gives_each_task_its_own(method):
    stack, shares = vectors(3, 3), [0.8, 0.3, 0.5]
    options = {} if method == "dare" else {"sign": "none", "combine": "sum"}
    found = merge(stack, method, density=shares, **options)
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    total = dict(zero)
    for task, share in enumerate(shares):
        alone = [vector if i == task else zero for i, vector in enumerate(stack)]
        part = merge(alone, method, density=share, **options)
        total = {name: total[name] + part[name] for name in SHAPES}
    for name in SHAPES:
        torch.testing.assert_close(found[name], total[name])


@pytest.mark.parametrize("gamma", [0, 0.05, 0.4])
@pytest.mark.parametrize("density", [0.9, [0.5, 0.02], [1, 0.3]])
def test_breadcrumbs_of_a_density_are_the_values_below_the_largest(gamma, density):
    stack = [{n: torch.randn(s) for n, s in SHAPES.items()} for _ in range(2)]
    found = merge(stack, "breadcrumbs", density=density, gamma=gamma)
    shares = density if isinstance(density, list) else [density] * 2
    for name in SHAPES:
        expected = torch.zeros(stack[0][name].numel(), dtype=torch.float64)
        for vector, share in zip(stack, shares, strict=True):
            flat = vector[name].double().flatten()
            stay = int(share * len(flat))
            first = max(0, len(flat) - stay - int(gamma * len(flat)))
            for index in flat.abs().argsort()[first : first + stay]:
                expected[index] += flat[index]
        torch.testing.assert_close(found[name].flatten().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [*KIN, "breadcrumbs"])
def test_files_merge_as_memory_does_with_these_options(tmp_path, method):
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tasks = [{n: base[n] + t for n, t in vector.items()} for vector in vectors(4, 3)]
    files = [write(tmp_path, f"t{i}", w, "safetensors") for i, w in enumerate((base, *tasks))]
    options = {"density": [0.5, 0.3, 0.6]}
    if method != "breadcrumbs":
        options |= {"sign": "count", "combine": "mean", "task_weights": [1.0, 0.5, -0.25]}
    out = tmp_path / "out.safetensors"
    merge_checkpoints(files[0], files[1:], out, method=method, block_size=50, **options)
    assert same_bits(read(out), in_memory(base, tasks, method, **options))
    for options in ({"density": [0.5, 0.3]}, {"density": [0.5] * 4}):
        with pytest.raises(
            InputError, match=r"density has . values for 3 tasks; give one for each"
        ):
            merge_checkpoints(files[0], files[1:], tmp_path / "none", method=method, **options)
    assert not (tmp_path / "none").exists()


def test_what_is_kept_does_not_grow_with_the_tasks():
    merger = get_merger("ties", task_weights=WEIGHTS * 2, density=[0.5] * 8, sign="count")
    kept = []
    for vector in vectors(7, 8):
        merger.update(vector)
        state = merger.state_dict()["accumulators"]["row"]
        kept.append(sum(tensor.nbytes for tensor in state.values()) / 31)
    assert set(kept) == {4 * 4 + 2 * 2}


def test_a_merger_can_be_stopped_and_goes_on_with_its_weights():
    stack, options = vectors(5), {"task_weights": WEIGHTS, "density": [0.5, 0.5, 0.2, 0.9]}
    first, second = (get_merger("ties", **options) for _ in range(2))
    for vector in stack[:2]:
        first.update(vector)
    second.load_state_dict(first.state_dict())
    for vector in stack[2:]:
        second.update(vector)
    expected = merge(stack, "ties", **options)
    assert all(torch.equal(second.merged()[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign": "total"}, "sign must be value, count or none, not 'total'"),
        ({"combine": "median"}, "combine must be mean or sum, not 'median'"),
        (
            {"task_weights": 0.5},
            "task_weights must be a list of numbers, one for each task, not 0.5",
        ),
        ({"task_weights": []}, "task_weights must be a list of numbers, one for each task, not []"),
        ({"task_weights": [1, "a"]}, "task_weights must be a number from -1e+06 to 1e+06, not 'a'"),
        ({"density": [0.5, 0]}, "density must be a number above 0 and at most 1, not 0"),
        (
            {"density": "0.5,0.3"},
            "density must be a number above 0 and at most 1, or a list of them, as in [0.5,0.3], "
            "not '0.5,0.3'",
        ),
        ({"density": []}, "density must be a number above 0 and at most 1, not []"),
    ],
)
@pytest.mark.parametrize("method", KIN)
def test_options_that_make_no_sense(method, options, message):
    with pytest.raises(InputError) as caught:
        get_merger(method, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("options", [{"density": [0.5, 0.5]}, {"task_weights": [1, 2]}])
def test_more_tasks_than_a_list_has_numbers_for(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} has 2 values, but there are more tasks"):
        merge(vectors(6, 3), "ties", **options)
