"""WUDI, NUFILT's projector and DOP against references in numpy, written from their formulas."""

import io

import numpy as np
import pytest
import torch
from merger_cases import run

from cl_merge.errors import InputError
from cl_merge.mergers import reference
from cl_merge.mergers.dual_projection import DualProjection
from cl_merge.mergers.null_space import NullSpaceFilter
from cl_merge.mergers.wudi import Wudi

pytestmark = pytest.mark.usefixtures("any_chunk")


def matrices(*shape, tasks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, *shape, generator=generator)


def stacked(vectors, name):
    return np.stack([vector[name].float().double().numpy() for vector in vectors])


def check(merger, vectors, naive, tolerance=1e-5):
    """Compare with a function of one parameter of all tasks; those that are no matrices: their mean."""
    merged = run(merger, vectors)
    assert list(merged) == list(vectors[0])
    for name, tensor in merged.items():
        stack = stacked(vectors, name)
        expected = naive(stack) if stack.ndim == 3 and stack.size else stack.mean(axis=0)
        assert tensor.dtype == torch.float32
        assert tensor.shape == expected.shape
        np.testing.assert_allclose(tensor, expected, tolerance, tolerance, err_msg=name)


# WUDI.


def naive_wudi(stack, ridge):
    """Least squares: T τ_tᵀ = τ_t τ_tᵀ for all tasks, and √ρ T = 0, each row of T by itself."""
    if len(stack) == 1:
        return stack[0]
    inputs, outputs = [], []
    for task in stack:
        length = np.linalg.norm(task)
        if length > 0:
            inputs.append(task / length)
            outputs.append(task @ task.T / length)
    columns = stack.shape[2]
    if not inputs:
        return np.zeros(stack.shape[1:])
    rho = ridge * sum(np.linalg.norm(one) ** 2 for one in inputs) / columns
    inputs.append(np.sqrt(rho) * np.eye(columns))
    outputs.append(np.zeros((len(stack[0]), columns)))
    return np.linalg.lstsq(np.concatenate(inputs), np.hstack(outputs).T, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1])
def test_wudi_matches_the_naive_reference(vectors, ridge):
    check(Wudi(ridge=ridge), vectors, lambda stack: naive_wudi(stack, ridge))


@pytest.mark.parametrize("shape", [(12, 9), (7, 15), (4, 30)])
def test_wudi_matches_the_readable_reference(shape):
    stack = matrices(*shape)
    merged = run(Wudi(ridge=1e-9), [{"w": matrix} for matrix in stack])["w"]
    torch.testing.assert_close(
        merged.double(), reference.wudi(stack.double()), rtol=1e-5, atol=1e-5
    )


def test_wudi_has_no_gradient_left():
    stack = matrices(8, 6).double()
    merged = run(Wudi(ridge=1e-10), [{"w": matrix} for matrix in stack])["w"].double()
    merged.requires_grad_()

    def loss(matrix):
        return sum(((matrix - t) @ t.T).square().sum() / t.square().sum() for t in stack)

    (gradient,) = torch.autograd.grad(loss(merged), merged)
    assert float(gradient.abs().max()) < 1e-5
    least = loss(merged.detach())
    assert all(least < loss(other) for other in (stack.sum(dim=0), stack.mean(dim=0)))


def test_wudi_adds_up_tasks_of_different_inputs_and_keeps_equal_ones_one():
    one, other = torch.zeros(5, 6), torch.zeros(5, 6)
    one[:, :3], other[:, 3:] = matrices(5, 3, tasks=2)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    merged = run(Wudi(), [{"w": one}, {"w": 3 * other}])["w"]
    torch.testing.assert_close(merged, one + 3 * other, **tolerance)
    torch.testing.assert_close(run(Wudi(), [{"w": one}] * 4)["w"], one, **tolerance)


def test_a_larger_ridge_holds_the_minimum_back():
    """Two tasks that turn nearly the same input in opposite ways."""
    tasks = [{"w": torch.tensor([[1.0, 0.01]])}, {"w": torch.tensor([[-1.0, 0.01]])}]
    lengths = [float(run(Wudi(ridge=ridge), tasks)["w"].norm()) for ridge in (1e-8, 1e-2, 1)]
    assert lengths[0] > 50
    assert lengths[0] > lengths[1] > lengths[2]


def test_wudi_keeps_the_same_whatever_the_number_of_tasks():
    merger = Wudi()
    sizes = set()
    for matrix in matrices(4, 7, tasks=5):
        merger.update({"w": matrix, "bias": matrix[:, 0]})
        kept = merger.state_dict()["accumulators"]
        sizes.add(sum(tensor.nbytes for state in kept.values() for tensor in state.values()))
    assert sizes == {4 * 28 + 8 * 28 + 8 * 49 + 4 * 4}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [((3, 4), (5, 6)), ((2, 2, 3), (4, 3, 5)), ((0, 3), (2, 3)), ((2,), (4,))]
)
def test_what_wudi_keeps_grows_with_its_parameters(before, after, flatten):
    """As if the tasks before had been 0 in what is new; also after a restart."""
    first, second = matrices(*before, tasks=2), matrices(*after, tasks=2, seed=1)
    padded = torch.zeros(2, *after)
    padded[(slice(None), *map(slice, before))] = first
    merger = Wudi(flatten=flatten)
    for matrix in first:
        merger.update({"w": matrix})
    assert merger.grow({"w": torch.Size(after), "new": torch.Size([2, 2])})
    file = io.BytesIO()
    torch.save(merger.state_dict(), file)
    file.seek(0)
    resumed = Wudi(flatten=flatten)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    new = torch.zeros(2, 2)
    found = run(resumed, [{"w": matrix, "new": new} for matrix in second])
    expected = run(Wudi(flatten=flatten), [{"w": m, "new": new} for m in [*padded, *second]])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [0, 1e-11, 2, "1", None])
def test_a_ridge_out_of_range_is_an_error(value):
    with pytest.raises(InputError) as caught:
        Wudi(ridge=value)
    assert str(caught.value) == f"ridge must be a number from 1e-10 to 1, not {value!r}"


# NUFILT's projector.


def naive_nufilt(stack, rank):
    """Take from each task, one direction after another, what it does along it."""
    total = stack[0]
    for task in stack[1:]:
        _, strengths, right = np.linalg.svd(total, full_matrices=False)
        for strength, direction in list(zip(strengths, right, strict=True))[:rank]:
            if strength > 1e-5 * strengths[0]:
                task = task - np.outer(task @ direction, direction)
        total = total + task
    return total


@pytest.mark.parametrize("rank", [1, 2, 128])
def test_nufilt_matches_the_naive_reference(make_vector, rank, tasks):
    """On values without equal singular values, among which rounding errors choose."""
    vectors = [make_vector(10 * tasks + task) for task in range(tasks)]
    for vector in vectors:
        del vector["expanded"]  # of rank 1 with what rounding errors add
    check(NullSpaceFilter(rank=rank), vectors, lambda stack: naive_nufilt(stack, rank), 1e-4)


@pytest.mark.parametrize("rank", [2, 128])
@pytest.mark.parametrize("shape", [(12, 9), (7, 15)])
def test_nufilt_matches_the_readable_reference(shape, rank):
    stack = matrices(*shape)
    merged = run(NullSpaceFilter(rank=rank), [{"w": matrix} for matrix in stack])["w"]
    expected = reference.nufilt(stack.double(), rank)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-4)


def test_main_inputs_of_earlier_tasks_give_what_they_gave():
    first, second = matrices(6, 9, tasks=2)
    right = torch.linalg.svd(first).Vh[:3]
    merged = run(NullSpaceFilter(rank=3), [{"w": first}, {"w": second}])["w"]
    torch.testing.assert_close(merged @ right.T, first @ right.T, rtol=1e-4, atol=1e-5)
    others = torch.linalg.svd(first).Vh[3:]
    torch.testing.assert_close(merged @ others.T, (first + second) @ others.T)


@pytest.mark.parametrize("value", [0, 1.5, "8", True])
def test_a_rank_that_is_no_count_is_an_error(value):
    with pytest.raises(InputError) as caught:
        NullSpaceFilter(rank=value)
    assert str(caught.value) == f"rank must be a whole number of 1 or more, not {value!r}"


# DOP.


def naive_dop(stack, alpha):
    """Least squares over all entries of W, of all terms of the loss one below the other."""
    merged = stack[0]
    rows, columns = merged.shape
    for task in stack[1:]:
        terms, wanted = [], []
        for weight, matrix in ((alpha, merged), (1 - alpha, task)):
            # ‖S Uᵀ D‖ = ‖τᵀ D‖ and ‖D V S‖ = ‖D τᵀ‖, of D = W - τ.
            left = np.kron(matrix.T, np.eye(columns))
            right = np.kron(np.eye(rows), matrix)
            for term in (left, right):
                terms.append(np.sqrt(weight) * term)
                wanted.append(np.sqrt(weight) * term @ matrix.reshape(-1))
        merged = np.linalg.lstsq(np.concatenate(terms), np.concatenate(wanted), rcond=1e-12)[0]
        merged = merged.reshape(rows, columns)
    return merged


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(5, 4), (3, 7), (6, 6)])
def test_dop_matches_the_naive_reference(alpha, shape):
    stack = matrices(*shape, tasks=4, seed=2)
    merged = run(DualProjection(alpha=alpha), [{"w": matrix} for matrix in stack])["w"]
    np.testing.assert_allclose(merged, naive_dop(stack.double().numpy(), alpha), 1e-4, 1e-4)


@pytest.mark.parametrize("shape", [(5, 4), (3, 7)])
def test_dop_matches_the_readable_reference(shape):
    stack = matrices(*shape)
    merged = run(DualProjection(), [{"w": matrix} for matrix in stack])["w"]
    torch.testing.assert_close(merged.double(), reference.dop(stack.double()), rtol=1e-5, atol=1e-5)


def test_dop_of_low_rank_matches_the_naive_reference():
    """Entries to which no matrix gives a weight are zero in both; of rank 1 in float32 exactly."""
    stack = matrices(6, 1, seed=3).mul(4).round() @ matrices(1, 5, seed=4).mul(4).round()
    merged = run(DualProjection(), [{"w": matrix} for matrix in stack])["w"]
    np.testing.assert_allclose(merged, naive_dop(stack.double().numpy(), 0.8), 1e-4, 1e-4)


def test_dop_of_equal_tasks_is_one_of_them_and_alpha_one_keeps_the_first():
    first, second = matrices(4, 6, tasks=2)
    merged = run(DualProjection(), [{"w": first}] * 3)["w"]
    torch.testing.assert_close(merged, first, rtol=1e-5, atol=1e-5)
    merged = run(DualProjection(alpha=1), [{"w": first}, {"w": second}])["w"]
    torch.testing.assert_close(merged, first, rtol=1e-5, atol=1e-5)


def test_dop_halves_what_is_no_matrix_with_each_task():
    merged = run(DualProjection(), [{"bias": torch.tensor([value])} for value in (8.0, 0.0, 2.0)])
    assert merged["bias"].tolist() == [3]
