"""Model Stock, SCE and the Karcher mean against references written from their formulas."""

import math

import pytest
import torch

from cl_merge.errors import InputError
from cl_merge.mergers import merge, reference

pytestmark = pytest.mark.usefixtures("any_chunk")


@pytest.fixture(params=[2, 3, 8], ids=lambda tasks: f"{tasks} tasks")
def tasks(request):
    return request.param


def check(method, vectors, function, **options):
    merged = merge(vectors, method, **options)
    for name, tensor in merged.items():
        stack = torch.stack([vector[name].reshape(-1).float().double() for vector in vectors])
        expected = function(stack) if stack.shape[1] else stack[0]
        assert tensor.dtype == torch.float32
        assert tensor.shape == vectors[0][name].shape
        torch.testing.assert_close(
            tensor.reshape(-1).double(), expected, rtol=1e-5, atol=1e-5, msg=name
        )


def merged_values(method, *values, **options):
    return merge([{"w": torch.tensor(one)} for one in values], method, **options)["w"]


# Model Stock.


def test_model_stock_matches_the_readable_reference(vectors):
    check("model-stock", vectors, reference.model_stock)


@pytest.mark.parametrize("count", [2, 5])
def test_model_stock_is_the_nearest_point_to_the_centre_for_vectors_of_one_angle(count):
    """Vectors that all share the part c: what is nearest to c between the base and their mean."""
    centre = torch.zeros(6)
    centre[-1] = 2
    stack = [centre + 3 * torch.eye(6)[task] for task in range(count)]
    mean = torch.stack(stack).mean(dim=0)
    nearest = mean * float(mean @ centre / (mean @ mean))
    merged = merge([{"w": vector} for vector in stack], "model-stock")["w"]
    torch.testing.assert_close(merged, nearest)


def test_model_stock_stays_at_the_base_where_tasks_disagree_and_goes_along_where_they_agree():
    assert merged_values("model-stock", [1.0, 0.0], [0.0, 5.0]).tolist() == [0, 0]
    assert merged_values("model-stock", [1.0, 2.0], [-1.0, -1.5]).tolist() == [0, 0]
    torch.testing.assert_close(
        merged_values("model-stock", [1.0, 2.0], [3.0, 6.0]), torch.tensor([2.0, 4.0])
    )


def test_a_task_that_changed_nothing_is_at_right_angles():
    merged = merged_values("model-stock", [3.0, 0.0], [3.0, 0.0], [0.0, 0.0])
    cosine = 1 / 3  # of three pairs, one is parallel
    torch.testing.assert_close(
        merged, torch.tensor([2.0, 0]) * 3 * cosine / (1 + 2 * cosine), rtol=1e-5, atol=0
    )


# SCE.


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_matches_the_readable_reference(vectors, density, tasks):
    if tasks == 3:  # a fourth: rounding errors of thirds tell equal variances of the grid apart
        vectors = [*vectors, vectors[0]]
    check("sce", vectors, lambda stack: reference.sce(stack, density), density=density)


def naive_sce(stack, density):
    """Element by element, in plain Python."""
    tasks, size = len(stack), len(stack[0])
    columns = [[vector[i] for vector in stack] for i in range(size)]
    means = [math.fsum(column) / tasks for column in columns]
    variances = [
        math.fsum((v - mean) ** 2 for v in column) / tasks
        for column, mean in zip(columns, means, strict=True)
    ]
    count = int(density * sum(variance > 0 for variance in variances))
    chosen = set(sorted(range(size), key=lambda i: -variances[i])[:count])
    if density == 1:
        chosen = set(range(size))
    weights = [math.fsum(vector[i] ** 2 for i in chosen) for vector in stack]
    merged = []
    for i, column in enumerate(columns):
        sign = math.copysign(1, total) if (total := math.fsum(column)) else 0
        kept = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        share = math.fsum(w for w, _ in kept)
        value = math.fsum(w * v for w, v in kept) / share if i in chosen and kept else 0.0
        merged.append(value)
    return merged


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_sce_matches_a_naive_reference(density):
    stack = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    stack[1, :10] = 0
    merged = merge([{"w": vector} for vector in stack], "sce", density=density)["w"]
    expected = torch.tensor(naive_sce(stack.tolist(), density))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_sce_keeps_what_the_tasks_agree_on_only_without_selection():
    same, differing = [2.0, 1.0], [2.0, 3.0]
    assert merged_values("sce", same, differing, density=0.5).tolist() == [0, 0]
    assert merged_values("sce", same, differing, density=0.99).tolist() == [0, 0]
    assert float(merged_values("sce", same, differing)[0]) == 2


def test_elements_that_cancel_are_zero():
    assert merged_values("sce", [1.0, 3.0], [-1.0, 1.0])[0] == 0


def test_a_share_of_nothing_is_an_error():
    with pytest.raises(InputError, match="density must be a number above 0 and at most 1, not 0"):
        merged_values("sce", [1.0], [2.0], density=0)


# The Karcher mean.


def test_karcher_matches_the_readable_reference(vectors, tasks):
    """Where the mean is not on the other side of the sphere: vectors around a common part."""
    common = {name: tensor.float() for name, tensor in vectors[0].items()}
    around = [
        {name: 2 * common[name] + 0.5 * tensor.float() for name, tensor in vector.items()}
        for vector in vectors
    ]
    around = [{n: t for n, t in vector.items() if common[n].any()} for vector in around]
    check("karcher", around, reference.karcher)


def test_the_karcher_mean_of_two_is_halfway_on_the_arc():
    one, two = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    two = two * one.norm() / two.norm()
    vectors = [{"w": one}, {"w": two}]
    halfway = merge(vectors, "slerp", t=0.5)["w"]
    torch.testing.assert_close(merge(vectors, "karcher")["w"], halfway, rtol=1e-5, atol=1e-6)


def test_no_direction_nearby_has_smaller_squared_angles():
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(5, 8, generator=generator).double() + 1
    units = stack / stack.norm(dim=1, keepdim=True)

    def spread(direction):
        return float((units @ (direction / direction.norm())).clamp(-1, 1).acos().square().sum())

    middle = merge([{"w": vector} for vector in stack], "karcher")["w"].double()
    for _ in range(20):
        nearby = middle + 0.01 * torch.randn(8, generator=generator).double()
        assert spread(middle) < spread(nearby)
    assert float(middle.norm()) == pytest.approx(float(stack.norm(dim=1).mean()), rel=1e-6)


def test_karcher_of_opposite_and_of_unchanged_tasks_is_finite():
    assert merged_values("karcher", [2.0, 0.0], [-2.0, 0.0]).abs().tolist() == [2, 0]
    assert merged_values("karcher", [0.0, 0.0], [4.0, 0.0]).tolist() == [2, 0]
    assert merged_values("karcher", [0.0, 0.0], [0.0, 0.0]).tolist() == [0, 0]
