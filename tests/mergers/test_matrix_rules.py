"""Rules on whole parameters against references in numpy, written from the papers' formulas."""

import math

import numpy as np
import pytest
import torch
from merger_cases import run

from cl_merge.errors import InputError
from cl_merge.mergers import reference
from cl_merge.mergers.chunks import Reader
from cl_merge.mergers.dual_projection import DualProjection
from cl_merge.mergers.isotropic import Isotropic, IsotropicTasks
from cl_merge.mergers.karcher import Karcher
from cl_merge.mergers.matrices import nearest_orthogonal, singular_triplets
from cl_merge.mergers.model_stock import ModelStock
from cl_merge.mergers.null_space import NullSpaceFilter
from cl_merge.mergers.orthogonal import OrthogonalProjection
from cl_merge.mergers.select_erase import SelectCalculateErase
from cl_merge.mergers.singular_vectors import SingularVectors
from cl_merge.mergers.slerp import Slerp
from cl_merge.mergers.wudi import Wudi

pytestmark = pytest.mark.usefixtures("any_chunk")
FLATTENING = [
    Isotropic,
    IsotropicTasks,
    SingularVectors,
    OrthogonalProjection,
    Wudi,
    NullSpaceFilter,
    DualProjection,
]
WHOLE = [Slerp, ModelStock, SelectCalculateErase, Karcher, *FLATTENING]
RULES = pytest.mark.parametrize("rule", WHOLE, ids=lambda rule: rule.name)


def arrays(vectors):
    return [{name: value.float().double().numpy() for name, value in v.items()} for v in vectors]


def check(merged, expected, tolerance=1e-5):
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.shape == expected[name].shape
        np.testing.assert_allclose(tensor, expected[name], tolerance, tolerance, err_msg=name)


def same_bits(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)) for name in one
    )


def inverse_root(gram):
    """The pseudo-inverse of the square root of a symmetric matrix."""
    values, vectors = np.linalg.eigh(gram)
    large = values > 1e-12 * max(values.max(initial=0), 1e-300)
    return (vectors[:, large] / np.sqrt(values[large])) @ vectors[:, large].T


def whitened(matrix):
    return matrix @ inverse_root(matrix.T @ matrix)


def is_matrix(array):
    return array.ndim == 2 and array.size > 0


# Slerp.


def naive_slerp(first, second, t):
    """Turn within the plane of both, then read the weights off in the basis of their directions."""
    a, b = first.reshape(-1), second.reshape(-1)
    if not a.any() or not b.any():
        return (1 - t) * first + t * second
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    across = v - (u @ v) * u
    if np.linalg.norm(across) < math.sqrt(1 - 0.9995**2):
        return (1 - t) * first + t * second
    angle = math.atan2(np.linalg.norm(across), u @ v)
    plane = np.stack([u, across / np.linalg.norm(across)])
    turned = np.array([math.cos(t * angle), math.sin(t * angle)])
    weights = np.linalg.solve((plane @ np.stack([u, v]).T), turned)
    return weights[0] * first + weights[1] * second


@pytest.mark.parametrize("t", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("grid", [False, True])
def test_slerp_matches_the_naive_reference(make_vector, grid, t):
    vectors = [make_vector(seed, grid=grid) for seed in (3, 4)]
    first, second = arrays(vectors)
    expected = {name: naive_slerp(first[name], second[name], t) for name in first}
    check(run(Slerp(t=t), vectors), expected, 1e-6)


def test_slerp_ends_at_its_task_vectors_exactly(make_vector):
    vectors = [make_vector(0), make_vector(1)]
    for t in (0, 1):
        merged = run(Slerp(t=t), vectors)
        assert all(torch.equal(merged[name], vectors[t][name].float()) for name in merged)


def test_slerp_keeps_the_length_of_vectors_of_equal_length():
    one, two = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    one, two = one / one.norm(), two / two.norm()
    for t in (0.1, 0.5, 0.7):
        merged = run(Slerp(t=t), [{"w": one}, {"w": two}])["w"]
        assert float(merged.norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("factor", [2.0, -2.0, 0.0], ids=["parallel", "opposite", "zero"])
def test_slerp_goes_straight_where_there_is_no_arc(factor):
    one = torch.tensor([3.0, -4.0, 0.0])
    merged = run(Slerp(t=0.25), [{"w": one}, {"w": factor * one}])["w"]
    torch.testing.assert_close(merged, (0.75 + 0.25 * factor) * one)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e18, 1e37])
def test_slerp_is_stable_whatever_the_size(size):
    one, two = torch.tensor([size, 0.0]), torch.tensor([0.0, size])
    merged = run(Slerp(), [{"w": one}, {"w": two}])["w"]
    torch.testing.assert_close(merged / size, torch.full([2], math.sqrt(0.5)))


def test_slerp_of_more_than_two_tasks_is_an_error():
    with pytest.raises(InputError) as caught:
        run(Slerp(), [{"w": torch.ones(2)}] * 3)
    assert str(caught.value) == (
        "'slerp' merges two task vectors, not 3; take another method, or merge two"
    )


def test_slerp_of_one_task_is_the_task():
    assert run(Slerp(), [{"w": torch.tensor([1.0, -2.0])}])["w"].tolist() == [1, -2]


# Iso-C.


def naive_isotropic(values):
    total = sum(values)
    if not is_matrix(total):
        return total / len(values)
    strength = np.linalg.norm(total, "nuc") / min(total.shape)
    return strength * whitened(total)


def test_isotropic_matches_the_naive_reference(vectors):
    stack = arrays(vectors)
    expected = {name: naive_isotropic([v[name] for v in stack]) for name in stack[0]}
    check(run(Isotropic(), vectors), expected)


def test_isotropic_has_one_singular_value_and_the_sum_of_all_that_were():
    vectors = [{"w": torch.randn(40, 30, generator=seeded(seed))} for seed in range(3)]
    total = sum(vector["w"].double() for vector in vectors)
    values = torch.linalg.svdvals(run(Isotropic(), vectors)["w"].double())
    torch.testing.assert_close(
        values, torch.linalg.svdvals(total).mean().expand(30), rtol=1e-5, atol=0
    )


def test_isotropic_leaves_alone_what_no_task_changed():
    change = torch.zeros(4, 5)
    change[1, 2] = 8
    merged = run(Isotropic(), [{"w": change}, {"w": change}])["w"]
    torch.testing.assert_close(merged, change * 2 / 4)


# Iso-CTS.


def naive_isotropic_tasks(values, common):
    """Direction by direction, with whitening by an eigendecomposition."""
    total = sum(values)
    if not is_matrix(total):
        return total / len(values)
    size = min(total.shape)
    each = min(round((size - int(size * common)) / len(values)), size // len(values))
    parts = []
    left, strengths, right = np.linalg.svd(total, full_matrices=False)
    real = strengths > 1e-6 * strengths[0]
    for i in range(size - each * len(values)):
        if real[i]:
            parts.append((strengths[i], left[:, i], right[i]))
    shared = np.array([row for _, row, _ in parts]).reshape(-1, len(total)).T
    for task in values:
        alone = task - shared @ np.linalg.lstsq(shared, task, rcond=None)[0]
        left, strengths, right = np.linalg.svd(alone, full_matrices=False)
        for i in range(each):
            if strengths[i] > 1e-6 * np.linalg.norm(task):
                parts.append((strengths[i], left[:, i], right[i]))
    if not parts:
        return np.zeros_like(total)
    lefts, rights = (np.array([part[i] for part in parts]) for i in (1, 2))
    mean = sum(part[0] for part in parts) / size
    return mean * whitened(lefts.T) @ whitened(rights)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_isotropic_tasks_match_the_naive_reference(make_vector, common, tasks):
    """On values without equal singular values, among which rounding errors choose."""
    vectors = [make_vector(10 * tasks + task) for task in range(tasks)]
    for vector in vectors:
        del vector["expanded"]  # of rank 1 with what rounding errors add
    stack = arrays(vectors)
    expected = {n: naive_isotropic_tasks([v[n] for v in stack], common) for n in stack[0]}
    check(run(IsotropicTasks(common=common), vectors), expected, 1e-4)


def test_isotropic_tasks_of_one_task_or_all_in_common_are_isotropic():
    vectors = [{"w": torch.randn(9, 6, generator=seeded(seed))} for seed in range(3)]
    for common, given in ((1.0, vectors), (0.8, vectors[:1])):
        expected = run(Isotropic(), given)["w"]
        torch.testing.assert_close(run(IsotropicTasks(common=common), given)["w"], expected)


def test_a_direction_of_one_task_alone_is_as_strong_as_those_that_all_share():
    shared, alone = torch.zeros(4, 4), torch.zeros(4, 4)
    shared[0, 0], alone[3, 3] = 5, 0.1
    merged = run(IsotropicTasks(common=0.5), [{"w": shared}, {"w": shared + alone}])["w"]
    torch.testing.assert_close(merged[0, 0], merged[3, 3])
    assert float(merged[1:3].abs().max()) < 1e-6


# TSV.


def naive_singular_vectors(values):
    if not is_matrix(values[0]):
        return sum(values) / len(values)
    count = max(1, min(values[0].shape) // len(values))
    lefts, strengths, rights = [], [], []
    for value in values:
        left, strength, right = np.linalg.svd(value, full_matrices=False)
        for i in range(count):
            if strength[i] > 1e-10 * strength[0]:
                lefts.append(left[:, i])
                strengths.append(strength[i])
                rights.append(right[i])
    if not strengths:
        return np.zeros(values[0].shape)
    left, right = whitened(np.stack(lefts, axis=1)), whitened(np.stack(rights, axis=1))
    return left @ np.diag(strengths) @ right.T


def test_singular_vectors_match_the_naive_reference(vectors):
    stack = arrays(vectors)
    expected = {name: naive_singular_vectors([v[name] for v in stack]) for name in stack[0]}
    check(run(SingularVectors(), vectors), expected)


def test_singular_vectors_of_one_task_are_that_task(make_vector):
    vector = make_vector(5)
    merged = run(SingularVectors(), [vector])
    assert all(torch.equal(merged[name], vector[name].float()) for name in vector)


def test_tasks_that_do_not_interfere_stay_what_they_are():
    left, right = (
        torch.linalg.qr(torch.randn(n, 6, generator=seeded(n)).double())[0] for n in (8, 6)
    )
    strengths = torch.tensor([9.0, 8, 7, 6, 5, 4], dtype=torch.float64)
    parts = [(left[:, i::2] * strengths[i::2]) @ right[:, i::2].T for i in range(2)]
    merged = run(SingularVectors(), [{"w": part} for part in parts])["w"]
    torch.testing.assert_close(merged.double(), sum(parts), rtol=1e-5, atol=1e-5)


def test_equal_tasks_stay_one():
    """In a pair of equal vectors there is one direction; the published code adds one at random."""
    vector = torch.outer(torch.arange(1.0, 7), torch.tensor([1.0, -1, 2, 0]))
    merged = run(SingularVectors(), [{"w": vector}] * 3)["w"]
    torch.testing.assert_close(merged, vector)


def test_more_tasks_than_directions_keep_one_each():
    vectors = [{"w": torch.randn(2, 9, generator=seeded(seed))} for seed in range(5)]
    assert float(run(SingularVectors(), vectors)["w"].norm()) > 1


# OPCM.


def naive_opcm(vectors, alpha):
    """The recursion as it is published, with λ(t) after each task, over the whole model."""

    def norm(vector):
        return math.sqrt(sum(float((value**2).sum()) for value in vector.values()))

    merged, scale = dict(vectors[0]), 1.0
    for task in range(1, len(vectors)):
        new = {
            name: scale * merged[name] + orthogonal(merged[name], vectors[task][name], alpha)
            for name in merged
        }
        mean = sum(norm(vector) for vector in vectors[: task + 1]) / (task + 1)
        scale = norm(new) / mean
        merged = {name: value / scale for name, value in new.items()}
    return merged


def orthogonal(before, task, alpha):
    if not is_matrix(task):
        return task
    left, strengths, right = np.linalg.svd(before)
    main = 0
    while main < len(strengths) and strengths[: main + 1].sum() <= alpha * strengths.sum():
        main += 1
    result = np.zeros_like(task)
    for i in range(task.shape[0]):
        for j in range(task.shape[1]):
            known = i < len(strengths) and strengths[i] > 1e-6 * strengths[0]
            if not ((i == j and known) or (i < main and j < main)):
                result += (left[:, i] @ task @ right[j]) * np.outer(left[:, i], right[j])
    return result


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 0.9])
def test_opcm_matches_the_naive_reference(vectors, alpha):
    check(run(OrthogonalProjection(alpha=alpha), vectors), naive_opcm(arrays(vectors), alpha), 1e-4)


def test_opcm_of_one_task_is_that_task(make_vector):
    vector = make_vector(5)
    merged = run(OrthogonalProjection(), [vector])
    assert all(torch.equal(merged[name], vector[name].float()) for name in vector)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_opcm_is_as_long_as_the_task_vectors_are_on_average(vectors, alpha):
    def length(vector):
        return math.sqrt(sum(float((v**2).sum()) for v in arrays([vector])[0].values()))

    merged = run(OrthogonalProjection(alpha=alpha), vectors)
    mean = sum(map(length, vectors)) / len(vectors)
    assert length(merged) == pytest.approx(mean, rel=1e-5)


def test_opcm_changes_nothing_along_the_main_directions():
    first, second = (torch.randn(20, 12, generator=seeded(seed)).double() for seed in (0, 1))
    merged = run(OrthogonalProjection(alpha=0.6), [{"w": first}, {"w": second}])["w"].double()
    left, strengths, right = torch.linalg.svd(first, full_matrices=False)
    main = int((strengths.cumsum(0) / strengths.sum() <= 0.6).sum())
    assert main > 2
    seen = left.T @ merged @ right.T
    scale = float(seen[0, 0] / strengths[0])
    torch.testing.assert_close(seen.diag(), scale * strengths, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        seen[:main, :main], scale * torch.diag(strengths[:main]), rtol=1e-5, atol=1e-5
    )


def test_opcm_with_alpha_one_takes_from_a_task_what_is_off_the_directions_before_only():
    first, second = torch.zeros(3, 3), torch.ones(3, 3)
    first[0, 0], first[1, 1] = 4, 2
    merged = run(OrthogonalProjection(alpha=1), [{"w": first}, {"w": second}])["w"]
    total = torch.tensor([[4.0, 0, 1], [0, 2, 1], [1, 1, 1]])
    torch.testing.assert_close(merged / merged.norm(), total / total.norm())


def test_opcm_has_one_length_for_the_whole_model():
    vectors = [{"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}] * 2
    merged = run(OrthogonalProjection(), vectors)
    assert merged["a"].tolist() == pytest.approx([3])
    assert merged["b"].tolist() == pytest.approx([4])
    vectors = [
        {"a": torch.tensor([1.0]), "b": torch.zeros(1)},
        {"a": torch.zeros(1), "b": torch.ones(1)},
    ]
    assert run(OrthogonalProjection(), vectors)["a"].tolist() == pytest.approx([math.sqrt(0.5)])


def test_opcm_takes_what_joins_as_unchanged_by_the_tasks_before():
    first, second, new = (torch.randn(6, 4, generator=seeded(seed)) for seed in range(3))
    merger = OrthogonalProjection()
    merger.update({"a": first})
    merger.grow({"a": first.shape, "b": new.shape})
    merger.update({"a": second, "b": new})
    vectors = [{"a": first, "b": torch.zeros(6, 4)}, {"a": second, "b": new}]
    assert same_bits(merger.merged(), run(OrthogonalProjection(), vectors))


def test_opcm_measures_a_vector_alike_however_it_is_cut_and_ordered(make_vector):
    vector = make_vector(0)
    turned = dict(reversed(vector.items()))
    rule = OrthogonalProjection()
    assert rule.prepare(Reader.of(vector)) == rule.prepare(Reader.of(turned))


# All.


@RULES
def test_kernels_are_taken_as_rows_of_values(rule):
    check_kernels_are_like(rule(), (-1,))


@pytest.mark.parametrize("rule", FLATTENING, ids=lambda rule: rule.name)
def test_kernels_are_matrices_if_that_is_wanted(rule):
    check_kernels_are_like(rule(flatten=True), (6, 6))


def check_kernels_are_like(merger, shape):
    """Kernels merge as a merger without options merges the same values in another shape."""
    kernels = [torch.randn(6, 2, 3, 1, generator=seeded(seed)) for seed in range(2)]
    merged = run(merger, [{"w": kernel} for kernel in kernels])["w"]
    expected = run(type(merger)(), [{"w": kernel.reshape(shape)} for kernel in kernels])["w"]
    assert torch.equal(merged.reshape(-1), expected.reshape(-1))


@RULES
def test_merging_zeros_gives_zeros(rule):
    zeros = {"w": torch.zeros(4, 3), "b": torch.zeros(3), "s": torch.zeros(())}
    assert all(not value.any() for value in run(rule(), [zeros, zeros]).values())


@RULES
@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit(rule):
    shapes = {"wide": (60, 200), "tall": (150, 40), "bias": (200,)}
    vectors = [
        {name: torch.randn(shape, generator=seeded(seed)) for name, shape in shapes.items()}
        for seed in range(2)
    ]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(rule(), vectors))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same_bits(*results)


@RULES
def test_flipping_all_signs_flips_the_result(rule):
    vectors = [{"w": torch.randn(9, 7, generator=seeded(seed))} for seed in range(2)]
    flipped = [{"w": -vector["w"]} for vector in vectors]
    assert torch.equal(run(rule(), flipped)["w"], -run(rule(), vectors)["w"])


@pytest.mark.parametrize("rule", FLATTENING, ids=lambda rule: rule.name)
def test_rounding_errors_of_low_rank_tasks_have_no_say(rule):
    tasks = torch.randn(2, 64, 4, generator=seeded(0)) @ torch.randn(2, 4, 64, generator=seeded(1))
    noisy = tasks * (1 + 1e-7 * torch.randn(tasks.shape, generator=seeded(2)))
    one, other = (run(rule(), [{"w": task} for task in stack])["w"] for stack in (tasks, noisy))
    assert float((one - other).norm()) < 1e-5 * float(one.norm())


@RULES
def test_large_values_do_not_overflow(rule):
    vectors = [{"w": torch.randn(5, 4, generator=seeded(seed)) * 1e37} for seed in range(2)]
    assert bool(run(rule(), vectors)["w"].isfinite().all())


@RULES
def test_task_vectors_that_cancel_leave_finite_values(rule):
    """Opposite, nearly dependent and unchanged ones, of very different lengths."""
    rows = [[1, 8.914e13, 0.0], [0, 0, 0.0], [-1, 0, 0.0], [2.0**75, 2.0**63, 0.0], [0, -1, 0.0]]
    for count in range(2, len(rows) + 1):
        vectors = [{"w": torch.tensor([row]), "b": torch.tensor(row)} for row in rows[:count]]
        if rule is Slerp:
            vectors = vectors[-2:]
        assert all(bool(value.isfinite().all()) for value in run(rule(), vectors).values())


def test_singular_triplets_leave_out_what_is_zero():
    matrix = torch.outer(torch.arange(1.0, 4), torch.ones(5))
    left, values, right = singular_triplets(matrix)
    assert (left.shape, values.shape, right.shape) == ((3, 1), (1,), (1, 5))
    torch.testing.assert_close((left * values) @ right, matrix.double())
    nothing = singular_triplets(torch.zeros(3, 2))
    assert [part.shape for part in nothing] == [(3, 0), (0,), (0, 2)]
    assert nearest_orthogonal(nothing[0]).shape == (3, 0)


def test_the_nearest_orthogonal_matrix_is_that_of_procrustes():
    matrix = torch.randn(9, 4, generator=seeded(0)).double()
    nearest = nearest_orthogonal(matrix)
    torch.testing.assert_close(nearest.T @ nearest, torch.eye(4).double())
    np.testing.assert_allclose(nearest, whitened(matrix.numpy()), 1e-9, 1e-9)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.5", None, True])
@pytest.mark.parametrize(
    ("rule", "option"), [(Slerp, "t"), (OrthogonalProjection, "alpha"), (DualProjection, "alpha")]
)
def test_a_share_outside_its_range_is_an_error(rule, option, value):
    with pytest.raises(InputError) as caught:
        rule(**{option: value})
    assert str(caught.value) == f"{option} must be a number from 0 to 1, not {value!r}"


@pytest.mark.parametrize("value", [0, 1, "yes", None])
@pytest.mark.parametrize("rule", FLATTENING)
def test_flatten_is_true_or_false(rule, value):
    with pytest.raises(InputError) as caught:
        rule(flatten=value)
    assert str(caught.value) == f"flatten must be true or false, not {value!r}"


def test_options_are_told():
    assert Slerp(t=1).options == {"t": 1.0}
    assert Isotropic(flatten=True).options == {"flatten": True}
    assert SingularVectors().options == {"flatten": False}
    assert OrthogonalProjection(alpha=0).options == {"alpha": 0.0, "flatten": False}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# The readable reference, on matrices of full rank.


@pytest.mark.parametrize(
    ("rule", "function"),
    [
        (Isotropic, reference.isotropic),
        (IsotropicTasks, reference.isotropic_tasks),
        (SingularVectors, reference.singular_vectors),
        (OrthogonalProjection, reference.opcm),
    ],
    ids=["iso-c", "iso-cts", "tsv", "opcm"],
)
@pytest.mark.parametrize("shape", [(12, 9), (7, 15)])
def test_rules_on_matrices_match_the_readable_reference(rule, function, shape):
    stack = torch.randn(3, *shape, generator=seeded(4))
    merged = run(rule(), [{"w": matrix} for matrix in stack])["w"]
    torch.testing.assert_close(merged.double(), function(stack.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.0])
def test_slerp_matches_the_readable_reference(factor):
    stack = torch.randn(2, 30, generator=seeded(5))
    stack[1] = stack[0] * factor if factor != 1 else stack[1]
    merged = run(Slerp(t=0.3), [{"w": vector} for vector in stack])["w"]
    expected = reference.slerp(stack.double(), t=0.3)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
