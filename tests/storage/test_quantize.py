"""Quantised task vectors: close, the same everywhere, and small; damaged files say so."""

import json
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_merge.errors import InputError
from cl_merge.storage import open_weights
from cl_merge.storage.files import load_tensors, save_tensors
from cl_merge.storage.quantize import (
    SCHEMES,
    STORES,
    check_store,
    decode_groups,
    dequantize,
    quantize,
    stored,
)
from cl_merge.task_vectors.task_vector import TaskVector

# Written out again, so that a slip in the table of the library shows: group, lowest and highest
# multiple, shares of the largest magnitude, bits per value.
RULES = {
    "int8": (128, -127, 127, [1.0], 8.125),
    "int4": (64, -7, 8, [1.0, 0.9, 0.8, 0.7, 0.6], 4.25),
    "int2": (32, -1, 2, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 2.5),
}
CODED = tuple(RULES)
ROUNDED = ("bf16", *CODED)


def heavy_tailed(*shape: int, seed: int = 0, size: float = 1e-3) -> torch.Tensor:
    """What task vectors look like: most values near zero, a few large, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) ** 3 * size
    return values * (torch.rand(shape, generator=generator) > 0.05)


def vector(seed: int = 0) -> TaskVector:
    return TaskVector(
        {
            "block.weight": heavy_tailed(70, 91, seed=seed),
            "block.bias": heavy_tailed(5000, seed=seed),
            "scalar": torch.tensor(0.3),
            "empty": torch.empty(0, 3),
            "conv": heavy_tailed(8, 16, 5, 7, seed=seed + 1).double(),
            "small": heavy_tailed(5, 5, seed=seed).bfloat16(),
            "zeros": torch.zeros(64, 64),
        },
        {"task": "birds"},
    )


def error_of(function, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    return str(caught.value)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bits(one, other) -> bool:
    both = [(one.codes, other.codes), (one.scales, other.scales)]
    return all(a is b or torch.equal(bits(a), bits(b)) for a, b in both)


# Values.


def reference(tensor: torch.Tensor, store: str) -> list[tuple[list[float], float]]:
    """Values and squared error of every group, one number at a time in float64."""
    group, low, high, clips, _ = RULES[store]
    flat = tensor.reshape(-1).float().double().tolist()
    groups = []
    for start in range(0, len(flat), group):
        values = flat[start : start + group]
        lowest, highest = min(*values, 0.0), max(*values, 0.0)
        peak = highest if highest >= -lowest else lowest
        peak = abs(peak) if low == -high else peak
        best = (None, math.inf)
        for clip in clips:
            scale = torch.tensor(peak / high).float() * torch.tensor(clip).float()
            scale = scale.bfloat16().item()
            near = [0.0] * len(values)
            if scale:
                near = [min(max(round(v / scale), low), high) * scale for v in values]
            error = math.fsum((a - b) ** 2 for a, b in zip(values, near, strict=True))
            if error < best[1]:
                best = (near, error)
        groups.append(best)
    return groups


@pytest.mark.parametrize("store", CODED)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_naive_reference(store, seed):
    tensor = heavy_tailed(67, 71, seed=seed)
    result = dequantize(quantize(tensor, store)).view(-1).double()
    start, differing = 0, 0
    for near, least in reference(tensor, store):
        ours = result[start : start + len(near)]
        error = (ours - tensor.view(-1)[start : start + len(near)].double()).square().sum().item()
        assert error == pytest.approx(least, rel=1e-5)
        differing += ours.tolist() != near
        start += len(near)
    assert start == result.numel()
    assert differing <= 1  # of two scales equally good to float32's precision either may be chosen


def test_bf16_is_bfloat16():
    tensor = heavy_tailed(70, 91)
    assert torch.equal(dequantize(quantize(tensor, "bf16")), tensor.bfloat16().float())


@pytest.mark.parametrize("store", CODED)
def test_small_parameters_and_vectors_are_bfloat16(store):
    for tensor in (heavy_tailed(5000), heavy_tailed(63, 65), torch.tensor(0.1)):
        assert torch.equal(dequantize(quantize(tensor, store)), tensor.bfloat16().float())


def test_float32_is_float32():
    tensor = heavy_tailed(70, 91)
    result = dequantize(quantize(tensor, "float32"))
    assert torch.equal(result, tensor)
    assert result.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("distribution", ["normal", "uniform", "heavy"])
@pytest.mark.parametrize("store", CODED)
def test_errors_are_at_most_half_a_step_where_nothing_is_clipped(store, distribution):
    generator = torch.Generator().manual_seed(1)
    tensor = {
        "normal": torch.randn(64, 128, generator=generator),
        "uniform": torch.rand(64, 128, generator=generator) - 0.5,
        "heavy": heavy_tailed(64, 128, size=1.0),
    }[distribution]
    group, low, high, *_ = RULES[store]
    quantized = quantize(tensor, store)
    step = quantized.scales.float()[:, None]
    values, result = (t.view(-1, group) for t in (tensor, dequantize(quantized)))
    inside = (values / step >= low - 0.5) & (values / step <= high + 0.5)
    assert ((values - result).abs() <= step.abs() * 0.5000001)[inside].all()
    assert inside.float().mean() > {"int8": 0.9999, "int4": 0.95, "int2": 0.6}[store]
    # Clipped values get the nearest multiple that there is.
    assert (((result / step) == low) | ((result / step) == high))[~inside].all()


@pytest.mark.parametrize(("store", "most"), [("int8", 0.01), ("int4", 0.12), ("int2", 0.40)])
def test_relative_errors_of_normal_values(store, most):
    tensor = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    assert (dequantize(quantize(tensor, store)) - tensor).norm() / tensor.norm() < most


@pytest.mark.parametrize("store", ROUNDED)
def test_zeros_stay_zero_and_no_sign_changes(store):
    tensor = heavy_tailed(100, 100)
    result = dequantize(quantize(tensor, store))
    assert (result[tensor == 0] == 0).all()
    assert (result * tensor >= 0).all()


@pytest.mark.parametrize("store", ROUNDED)
def test_a_pruned_parameter_keeps_its_zeros(store):
    tensor = heavy_tailed(100, 100)
    tensor[tensor.abs() < 2e-3] = 0
    assert (dequantize(quantize(tensor, store))[tensor == 0] == 0).all()
    assert not dequantize(quantize(torch.zeros(100, 100), store)).any()


@pytest.mark.parametrize("store", CODED)
def test_the_largest_of_a_group_gets_the_highest_multiple(store):
    group, _, high, *_ = RULES[store]
    tensor = heavy_tailed(128, 128, seed=3)
    quantized = quantize(tensor, store)
    index = tensor.view(-1, group).abs().argmax(1, keepdim=True)
    peaks = dequantize(quantized).view(-1, group).gather(1, index)[:, 0]
    assert torch.equal(peaks.abs(), quantized.scales.float().abs() * high)


@pytest.mark.parametrize("store", CODED)
def test_half_way_values_round_to_even(store):
    group, low, high, *_ = RULES[store]
    whole = torch.arange(4096) % (high - low + 1) + low
    tensor = whole.float().view(-1, group)  # of which 1 is the scale that makes no error
    tensor[:, 0] = high
    halves = torch.arange(low, high) + 0.5
    tensor[:, 1] = halves[torch.arange(len(tensor)) % len(halves)]
    quantized = quantize(tensor, store)
    assert (quantized.scales == 1).all()
    assert torch.equal(dequantize(quantized), tensor.round().clamp(low, high))


# All kinds of tensors.


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3).flatmap(
        lambda s: st.sampled_from([tuple(s), (64, *s[:1], 70), (4096 + sum(s), 1), (*s[:1], 4099)])
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    exponent=st.integers(-38, 30),
    transposed=st.booleans(),
    store=st.sampled_from(STORES),
    seed=st.integers(0, 10),
)
def test_any_tensor_comes_back_in_shape_and_a_second_time_with_the_same_bits(
    shape, dtype, exponent, transposed, store, seed
):
    exponent = max(min(exponent, 2), -6) if dtype == torch.float16 else exponent
    tensor = heavy_tailed(*shape, seed=seed, size=10.0**exponent).to(dtype)
    tensor = tensor.movedim(0, -1) if transposed and tensor.ndim > 1 else tensor
    quantized = quantize(tensor, store)
    result = dequantize(quantized)
    assert result.shape == tensor.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert result.isfinite().all()
    assert same_bits(quantize(tensor.float().contiguous(), store), quantized)
    again = quantize(result, store)
    assert same_bits(again, quantized)
    assert torch.equal(dequantize(again), result)


def test_wide_inputs_are_rounded_to_float32_first():
    tensor = heavy_tailed(64, 64).double()
    assert same_bits(quantize(tensor * (1 + 1e-12), "int4"), quantize(tensor, "int4"))


@pytest.mark.parametrize("store", ROUNDED)
def test_extreme_groups_stay_finite(store):
    largest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    rows = torch.zeros(8, 1024)
    rows[0], rows[1], rows[2, ::2] = largest, -largest, largest
    rows[2, 1::2] = -largest
    rows[3] = 2.0**-149
    rows[4] = torch.linspace(-tiny, tiny, 1024)
    rows[5, 0] = largest
    rows[6] = torch.linspace(-1e-30, 1e-30, 1024)
    result = dequantize(quantize(rows, store))
    assert result.isfinite().all()
    torch.testing.assert_close(result[0], rows[0], rtol=0.01, atol=0)
    torch.testing.assert_close(result[1], rows[1], rtol=0.01, atol=0)
    assert (result[2] * rows[2] > 0).all()
    assert (result[3:5].abs() <= 2 * tiny).all()
    assert result[5, 0] > 0.9 * largest
    assert not result[5, 1:].any()
    assert (result[6] - rows[6]).double().norm() < 0.45 * rows[6].double().norm()
    assert not result[7].any()


@pytest.mark.parametrize("store", CODED)
def test_scales_below_the_normal_numbers_are_zero_and_no_others(store):
    tiny, (group, _, high, *_) = torch.finfo(torch.float32).tiny, RULES[store]
    peaks = tiny * high * torch.linspace(0.25, 4, 256)
    tensor = peaks[:, None] * heavy_tailed(256, group).clamp(-1e-3, 1e-3) * 1e3
    tensor[:, 3] = peaks
    quantized = quantize(tensor, store)
    normal = peaks / high >= tiny
    assert torch.equal(quantized.scales != 0, normal)
    assert torch.equal(dequantize(quantized).view(256, group).any(dim=1), normal)
    assert same_bits(quantize(dequantize(quantized), store), quantized)


@pytest.mark.parametrize(("store", "low"), [("int8", -127), ("int4", -7), ("int2", -1)])
def test_of_equal_magnitudes_the_positive_one_gets_the_highest_multiple(store, low):
    group, _, high, *_ = RULES[store]
    tensor = torch.zeros(4096 // group, group)
    tensor[:, 5], tensor[:, 6], tensor[:, 7] = -high, high, -high
    quantized = quantize(tensor, store)
    assert (quantized.scales > 0).all()
    result = dequantize(quantized).view(-1, group) / quantized.scales[:, None]
    assert torch.equal(result[0, 5:8], torch.tensor([low, high, low]).float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (64, 64)])
@pytest.mark.parametrize("store", ROUNDED)
def test_values_that_are_not_finite_are_an_error(store, shape, value, tmp_path):
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = value
    message = "NaN or infinity, which cannot be quantised; store it as float32"
    assert error_of(quantize, tensor, store) == message
    assert error_of(stored, {"w": tensor}, store) == f"w: {message}"
    broken = TaskVector({"w": tensor})
    assert error_of(broken.save, tmp_path / "task.safetensors", store=store) == f"w: {message}"
    assert not list(tmp_path.iterdir())


def test_values_beyond_float32_are_an_error():
    tensor = torch.full((64, 64), 1e300, dtype=torch.float64)
    assert "NaN or infinity" in error_of(quantize, tensor, "int4")


def test_integers_are_an_error():
    message = "only floating-point tensors can be quantised, not torch.int64"
    assert error_of(quantize, torch.tensor([1]), "int4") == message


@pytest.mark.parametrize("store", ["int3", "", None, 4, ["int4"]])
def test_an_unknown_store_is_an_error(store, tmp_path):
    message = error_of(check_store, store)
    assert message.startswith(f"unknown store '{store}'")
    assert message.endswith("Known: float32, bf16, int8, int4, int2")
    for function in (
        lambda: quantize(torch.ones(1), store),
        lambda: stored({}, store),
        lambda: vector().save(tmp_path / "task.safetensors", store=store),
    ):
        assert error_of(function) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cut_and_the_threads_do_not_matter():
    tensor = heavy_tailed(300, 401)
    expected = {store: quantize(tensor, store) for store in ROUNDED}
    before = torch.get_num_threads()
    for piece, threads in ((128, 1), (1 << 12, 3), (1 << 30, 2)):
        torch.set_num_threads(threads)
        try:
            for store, quantized in expected.items():
                assert same_bits(quantize(tensor, store, piece=piece), quantized)
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("store", STORES)
def test_the_device_does_not_matter(store):
    tensor = heavy_tailed(300, 401)
    there = quantize(tensor.cuda(), store)
    assert there.codes.is_cuda
    assert torch.equal(bits(there.codes.cpu()), bits(quantize(tensor, store).codes))
    assert torch.equal(dequantize(there).cpu(), dequantize(quantize(tensor, store)))


def test_every_byte_is_read_as_its_codes():
    for store, (_, _, high, *_) in RULES.items():
        scheme = SCHEMES[store]
        packed = torch.arange(256).to(torch.uint8)
        groups = 256 // scheme.group_bytes
        values = decode_groups(packed, torch.ones(groups).bfloat16(), scheme)
        size = 1 << scheme.bits
        expected = [b // size**i % size for b in range(256) for i in range(8 // scheme.bits)]
        assert values.tolist() == [code - size if code > high else code for code in expected]


# Files.


@pytest.mark.parametrize("store", STORES)
def test_what_was_saved_is_loaded(store, tmp_path):
    path = tmp_path / "runs" / "task0.safetensors"
    original = vector()
    original.save(path, store=store)
    loaded = TaskVector.load(path)
    assert loaded.keys() == original.keys()
    expected = stored(original, store)
    for name, tensor in loaded.items():
        assert tensor.shape == original[name].shape
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(bits(tensor), bits(expected[name]))
    assert loaded.metadata == {"task": "birds"} | (
        {} if store == "float32" else {"cl_merge.store": store}
    )


def test_float32_files_are_what_they_always_were(tmp_path):
    vector().save(tmp_path / "new.safetensors")
    save_tensors(tmp_path / "old.safetensors", vector(), {"task": "birds"} | MARK1)
    vector().save(tmp_path / "int4.safetensors", store="int4")
    loaded = TaskVector.load(tmp_path / "int4.safetensors")
    TaskVector(vector(), loaded.metadata).save(tmp_path / "again.safetensors")
    old = (tmp_path / "old.safetensors").read_bytes()
    assert (tmp_path / "new.safetensors").read_bytes() == old
    assert (tmp_path / "again.safetensors").read_bytes() == old


MARK1 = {"cl_merge.task_vector": "1"}


@pytest.mark.parametrize("store", ROUNDED)
def test_the_same_content_gives_the_same_bytes(store, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    vector().save(one, store=store)
    turned = dict(reversed(list(vector().items())))
    TaskVector(turned, {"z": "1", **vector().metadata, "cl_merge.store": "?"}).save(two, store)
    TaskVector(turned, {"task": "birds", "z": "1"}).save(one, store)
    assert one.read_bytes() == two.read_bytes()
    TaskVector.load(one).save(two, store)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("store", CODED)
def test_files_have_the_size_they_should(store, tmp_path):
    path = tmp_path / "task.safetensors"
    TaskVector({"w": heavy_tailed(1000, 1024), "b": heavy_tailed(1000)}).save(path, store=store)
    expected = 1000 * 1024 * RULES[store][-1] / 8 + 2000
    assert 0 <= path.stat().st_size - expected < 1000
    assert quantize(heavy_tailed(64, 128), store).nbytes == 64 * 128 * RULES[store][-1] / 8


def test_fifty_vectors_of_a_vit_take_less_than_one_and_a_half_gigabytes():
    coded, other = 86_000_000, 200_000
    assert 50 * (coded * RULES["int2"][-1] + other * 16) / 8 < 1.5e9


def test_names_cannot_clash(tmp_path):
    names = ["w", "codes/w", "scales/w", "values/w", "codes/codes/w", "", "/", "täter.gewicht"]
    original = TaskVector({n: heavy_tailed(64, 65, seed=i) for i, n in enumerate(names)})
    original.save(tmp_path / "task.safetensors", store="int2")
    loaded = TaskVector.load(tmp_path / "task.safetensors")
    assert loaded == TaskVector(stored(original, "int2"))


def test_a_vector_without_tensors_comes_back(tmp_path):
    TaskVector({}).save(tmp_path / "task.safetensors", store="int4")
    assert len(TaskVector.load(tmp_path / "task.safetensors")) == 0


# Reading in stretches.


@pytest.mark.parametrize("store", ROUNDED)
def test_stretches_are_those_of_the_whole(store, tmp_path):
    path = tmp_path / "task.safetensors"
    vector().save(path, store=store)
    whole, weights = TaskVector.load(path), open_weights(path)
    assert weights.path == path
    assert weights.kind == "task vector"
    assert weights.is_task_vector
    assert weights.metadata == whole.metadata
    assert list(weights.names) == list(whole)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in whole.items():
        assert weights.shape(name) == tensor.shape
        assert weights.dtype(name) == torch.float32
        n = tensor.numel()
        cuts = torch.randint(0, n + 1, (40, 2), generator=generator).sort(dim=1).values.tolist()
        for start, stop in [*cuts, (0, n), (n, n), (0, 0), (0, min(n, 1)), (n // 2, n // 2 + 1)]:
            part = weights.read(name, start, stop)
            assert part.dtype == torch.float32
            assert torch.equal(bits(part), bits(tensor.view(-1)[start:stop]))
    weights.close()


def test_threads_may_read_at_once(tmp_path):
    path = tmp_path / "task.safetensors"
    TaskVector({"w": heavy_tailed(400, 500)}).save(path, store="int4")
    weights, whole = open_weights(path), TaskVector.load(path)["w"].view(-1)
    wrong = []

    def read(offset: int) -> None:
        for start in range(offset, 200_000, 7001):
            part = weights.read("w", start, min(start + 7001, 200_000))
            if not torch.equal(part, whole[start : start + 7001]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(i * 11,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Damage.


@pytest.fixture
def parts(tmp_path):
    """Tensors and metadata of a quantised file, and a function that writes them changed."""
    path = tmp_path / "task.safetensors"
    TaskVector({"w": heavy_tailed(70, 91), "b": torch.ones(3)}).save(path, store="int4")
    tensors, metadata = load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def error(tensors, metadata) -> str:
        save_tensors(path, tensors, metadata)
        message = error_of(TaskVector.load, path)
        assert error_of(open_weights, path) == message
        return message.replace(str(path), "FILE")

    return tensors, metadata, error


DAMAGED = "'FILE' is no whole quantised task vector: {}; write or download it again"


@pytest.mark.parametrize("key", ["codes/w", "scales/w", "values/b"])
def test_a_missing_tensor_is_named(parts, key):
    tensors, metadata, error = parts
    del tensors[key]
    assert error(tensors, metadata) == DAMAGED.format(f"'{key}' is missing")


def test_an_extra_tensor_is_named(parts):
    tensors, metadata, error = parts
    tensors["codes/x"] = torch.ones(1)
    assert error(tensors, metadata) == DAMAGED.format("'codes/x' belongs to no parameter")


def test_wrong_lengths_and_dtypes_are_named(parts):
    tensors, metadata, error = parts
    wrong = {
        "codes/w": (tensors["codes/w"][:-1], "torch.uint8 (3199,) instead of torch.uint8 (3200,)"),
        "scales/w": (
            tensors["scales/w"].float(),
            "torch.float32 (100,) instead of torch.bfloat16 (100,)",
        ),
        "values/b": (
            tensors["values/b"][None],
            "torch.bfloat16 (1, 3) instead of torch.bfloat16 (3,)",
        ),
    }
    for key, (tensor, what) in wrong.items():
        message = error({**tensors, key: tensor}, metadata)
        assert message == DAMAGED.format(f"'{key}' is {what}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_scales_that_are_no_scales_are_named(parts, value):
    tensors, metadata, error = parts
    tensors["scales/w"][7] = value
    what = "'scales/w' holds NaN or values that are too large"
    assert error(tensors, metadata) == DAMAGED.format(what)


@pytest.mark.parametrize(
    "shapes",
    [
        "",
        "{",
        "[]",
        '{"w": 3}',
        '{"w": [-1, 4]}',
        '{"w": [1.5]}',
        '{"w": [true, 4]}',
        '{"w": ["4"]}',
        json.dumps({"w": [1 << 63]}),
        json.dumps({"w": [1 << 40, 1 << 40]}),
        json.dumps({"w": [1 << 40, 1 << 40, 0]}),
        json.dumps({"w": [1] * 65}),
        "[" * 100_000,
    ],
)
def test_impossible_shapes_are_an_error(parts, shapes):
    tensors, metadata, error = parts
    what = "its metadata lack the shapes of the parameters, 'cl_merge.shapes'"
    assert error(tensors, metadata | {"cl_merge.shapes": shapes}) == DAMAGED.format(what)


def test_shapes_that_do_not_fit_are_an_error(parts):
    tensors, metadata, error = parts
    message = error(tensors, metadata | {"cl_merge.shapes": '{"w":[70,92],"b":[3]}'})
    assert message == DAMAGED.format(
        "'codes/w' is torch.uint8 (3200,) instead of torch.uint8 (3232,)"
    )


def test_an_unknown_or_missing_store_is_an_error(parts):
    tensors, metadata, error = parts
    assert error(tensors, metadata | {"cl_merge.store": "int3"}) == (
        "'FILE' stores its values as 'int3', which this cl_merge does not know; update cl_merge"
    )
    del metadata["cl_merge.store"]
    assert error(tensors, metadata) == DAMAGED.format("its metadata lack 'cl_merge.store'")


def test_a_file_cut_short_is_an_error(tmp_path):
    path = tmp_path / "task.safetensors"
    vector().save(path, store="int4")
    path.write_bytes(path.read_bytes()[:-10])
    assert "is not a whole safetensors file" in error_of(TaskVector.load, path)
