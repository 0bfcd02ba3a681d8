"""A task vector is the difference of two sets of weights, and says so where there is none."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl_merge.errors import InputError
from cl_merge.storage.files import save_tensors
from cl_merge.task_vectors.task_vector import TaskVector

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """A state dict of mixed shapes, dtypes and strides."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "weight": normal(4, 3),
        "transposed": normal(3, 4).t(),
        "channels_last": normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": normal(),
        "empty": normal(0, 3),
        "double": normal(5).double(),
        "bfloat16": normal(5).bfloat16(),
        "half": normal(5).half(),
        "steps": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
    }


def error_of(function, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    return str(caught.value)


def test_between_is_the_difference_in_float32_of_all_floating_point_tensors():
    base, tuned = weights(0), weights(1)
    vector = TaskVector.between(base, tuned)
    assert list(vector) == [n for n, tensor in base.items() if tensor.is_floating_point()]
    for name, change in vector.items():
        expected = (tuned[name].double() - base[name].double()).float()
        assert change.dtype == torch.float32
        assert change.is_contiguous()
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=0)


def test_between_subtracts_wide_inputs_before_rounding():
    base = {"w": torch.tensor([1.0], dtype=torch.float64)}
    tuned = {"w": torch.tensor([1.0 + 1e-12], dtype=torch.float64)}
    change = TaskVector.between(base, tuned)["w"]
    assert change.item() == pytest.approx(1e-12, rel=1e-3)


def test_between_keeps_half_precision_differences_exactly():
    base = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    tuned = {"w": torch.tensor([2**-20], dtype=torch.bfloat16)}
    assert TaskVector.between(base, tuned)["w"].item() == 2**-20 - 1.0


def test_between_aliases_neither_input():
    base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    vector = TaskVector.between(base, tuned)
    base["w"].fill_(5)
    tuned["w"].fill_(7)
    assert vector["w"].tolist() == [1, 1]
    vector["w"].fill_(9)
    assert base["w"].tolist() == [5, 5]
    assert tuned["w"].tolist() == [7, 7]


def test_between_takes_parameters_and_keeps_no_graph():
    base, tuned = nn.Linear(3, 2), nn.Linear(3, 2)
    vector = TaskVector.between(dict(base.named_parameters()), dict(tuned.named_parameters()))
    moved = vector.apply_to(dict(base.named_parameters()))
    assert not any(tensor.requires_grad for tensor in [*vector.values(), *moved.values()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_between_result_lives_on_the_device_of_the_base():
    here, there = {"w": torch.zeros(2)}, {"w": torch.ones(2, device="cuda")}
    assert TaskVector.between(here, there)["w"].device.type == "cpu"
    assert TaskVector.between(there, here)["w"].device.type == "cuda"
    assert TaskVector.between(there, there).apply_to(here)["w"].device.type == "cpu"


def test_names_that_differ_are_listed():
    base = {name: torch.ones(1) for name in "abcdefg"}
    tuned = {name: torch.ones(1) for name in "agx"}
    assert error_of(TaskVector.between, base, tuned) == (
        "the fine-tuned model has other tensors than the base; missing: b, c, d, e and 1 more; "
        "extra: x. Both must come from one architecture"
    )


def test_integer_tensors_must_match_too():
    base = {"w": torch.ones(1), "steps": torch.tensor(1)}
    assert "missing: steps; extra: none" in error_of(TaskVector.between, base, {"w": torch.ones(1)})


def test_shapes_that_differ_are_listed():
    base = {"w": torch.ones(2, 3), "b": torch.ones(())}
    tuned = {"w": torch.ones(3, 2), "b": torch.ones(1)}
    assert error_of(TaskVector.between, base, tuned) == (
        "the fine-tuned model has other shapes than the base: w (3, 2) instead of (2, 3), "
        "b (1,) instead of ()"
    )


def test_dtypes_that_differ_are_listed():
    base, tuned = {"w": torch.ones(2)}, {"w": torch.ones(2).bfloat16()}
    assert error_of(TaskVector.between, base, tuned) == (
        "the fine-tuned model has other dtypes than the base: w bfloat16 instead of "
        "float32. Convert one of the two"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite_are_found_in_the_right_model(value, dtype):
    good = {"a": torch.ones(3, dtype=dtype), "b": torch.ones(3, dtype=dtype)}
    bad = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1, value, 1], dtype=dtype)}
    advice = (
        "NaN or infinity in b. Training diverged or a file is damaged: leave it out, or train "
        "again, for example with a lower learning rate"
    )
    assert error_of(TaskVector.between, good, bad) == f"the fine-tuned weights: {advice}"
    assert error_of(TaskVector.between, bad, good) == f"the base: {advice}"
    assert error_of(TaskVector.between, bad, bad) == f"the base: {advice}"


def test_a_difference_that_overflows_is_an_error():
    base, tuned = {"w": torch.tensor([-3e38])}, {"w": torch.tensor([3e38])}
    assert error_of(TaskVector.between, base, tuned).startswith(
        "the difference of the weights in float32: NaN or infinity in w."
    )


def test_large_finite_values_are_no_error():
    values = torch.full((10,), 3e38)
    TaskVector.between({"w": torch.zeros(10)}, {"w": values})
    TaskVector({"w": values}).check_finite("it")
    TaskVector({"w": torch.full((10,), 6e4, dtype=torch.float16)}).check_finite("it")


def test_check_finite_names_the_tensors():
    vector = TaskVector(
        {"a": torch.tensor([math.nan]), "b": torch.ones(1), "c": torch.tensor(math.inf)}
    )
    message = error_of(vector.check_finite, "task 3")
    assert message.startswith("task 3: NaN or infinity in a, c. Training diverged")


def test_apply_to_undoes_between():
    base, tuned = weights(0), weights(1)
    result = TaskVector.between(base, tuned).apply_to(base)
    for name, tensor in result.items():
        assert tensor.dtype == base[name].dtype
        assert tensor.shape == base[name].shape
        expected = tuned[name] if tensor.is_floating_point() else base[name]
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(tensor.dtype, 1e-6)
        torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance)


def test_apply_to_adds_in_float32_and_rounds_once():
    base = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    change = TaskVector({"w": torch.tensor([2**-7 - 2**-12])})
    # Rounded to bfloat16 first, the change would carry the sum to the next value twice over.
    assert change.apply_to(base, scale=0.5)["w"].item() == 1.0
    assert change.apply_to(base, scale=1.0)["w"].item() == 1.0 + 2**-7


def test_apply_to_passes_other_tensors_as_they_are_and_changes_nothing_in_place():
    base = {"w": torch.ones(2), "steps": torch.tensor(3), "frozen": torch.ones(1)}
    result = TaskVector({"w": torch.ones(2)}).apply_to(base, scale=2)
    assert list(result) == list(base)
    assert result["steps"] is base["steps"]
    assert result["frozen"] is base["frozen"]
    assert result["w"].tolist() == [3, 3]
    assert base["w"].tolist() == [1, 1]


def test_apply_to_does_not_alias_the_base_even_at_scale_zero():
    base = {"w": torch.ones(2)}
    TaskVector({"w": torch.ones(2)}).apply_to(base, scale=0)["w"].fill_(9)
    assert base["w"].tolist() == [1, 1]


def test_apply_to_names_what_the_base_lacks():
    assert error_of(TaskVector({"w": torch.ones(2)}).apply_to, {"v": torch.ones(2)}) == (
        "the base lacks tensors that the task vector changes: w. "
        "It must be the model that the task vector was made with"
    )


def test_apply_to_names_shapes_that_differ():
    assert error_of(TaskVector({"w": torch.ones(2)}).apply_to, {"w": torch.ones(3)}) == (
        "the base has other shapes than the task vector: w (3,) instead of (2,)"
    )


def test_complex_tensors_are_left_out_unless_they_differ():
    base = {"weight": torch.zeros(2), "wave": torch.ones(2, dtype=torch.complex64)}
    assert list(TaskVector.between(base, base)) == ["weight"]
    with pytest.raises(InputError, match="complex tensors differ, .* cannot hold: wave; leave"):
        TaskVector.between(base, base | {"wave": 2 * base["wave"]})


def test_apply_to_refuses_integer_weights():
    assert error_of(TaskVector({"w": torch.ones(1)}).apply_to, {"w": torch.tensor([1])}) == (
        "what a task vector changes holds floating-point tensors only; leave out w (torch.int64)"
    )


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "0.5", None, True])
def test_a_scale_that_is_no_finite_number_is_an_error(scale):
    vector = TaskVector({"w": torch.ones(1)})
    message = f"the scale must be a finite number, not {scale!r}"
    assert error_of(vector.apply_to, {"w": torch.ones(1)}, scale=scale) == message
    assert error_of(vector.__mul__, scale) == message


@pytest.mark.parametrize("scale", [1e39, -(10**400)])
def test_a_scale_that_float32_does_not_hold_is_an_error(scale):
    vector = TaskVector({"w": torch.ones(1)})
    message = f"the scale must be a finite number, not {scale!r}, which float32 does not hold"
    assert error_of(vector.apply_to, {"w": torch.ones(1)}, scale=scale) == message
    assert error_of(vector.__mul__, scale) == message


def test_only_floating_point_tensors_make_a_task_vector():
    tensors = {"w": torch.ones(1), "steps": torch.tensor(1), "mask": torch.tensor(True)}
    assert error_of(TaskVector, tensors) == (
        "a task vector holds floating-point tensors only; "
        "leave out steps (torch.int64), mask (torch.bool)"
    )


def test_arithmetic_is_that_of_vectors():
    one = TaskVector({"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(3.0)})
    two = TaskVector({"b": torch.tensor(1.0), "w": torch.tensor([0.5, 0.5])})
    assert one + two == TaskVector({"w": torch.tensor([1.5, -1.5]), "b": torch.tensor(4.0)})
    assert one - two == TaskVector({"w": torch.tensor([0.5, -2.5]), "b": torch.tensor(2.0)})
    assert -one == TaskVector({"w": torch.tensor([-1.0, 2.0]), "b": torch.tensor(-3.0)})
    assert one * 2 == 2 * one == one + one
    assert one != two
    assert one != {"w": 1}


def test_arithmetic_makes_new_float32_tensors():
    one = TaskVector({"w": torch.ones(2).bfloat16()})
    for result in (one + one, one - one, -one, one * 1):
        assert result["w"].dtype == torch.float32
        result["w"].fill_(9)
    assert one["w"].tolist() == [1, 1]


def test_arithmetic_on_parameters_keeps_no_graph():
    vector = TaskVector(dict(nn.Linear(3, 2).named_parameters()))
    results = (vector, vector + vector, -vector, 2 * vector)
    assert not any(tensor.requires_grad for result in results for tensor in result.values())


def test_arithmetic_names_what_differs():
    one, two = TaskVector({"w": torch.ones(1)}), TaskVector({"v": torch.ones(1)})
    assert error_of(one.__add__, two) == (
        "the second task vector has other tensors than the first; missing: w; extra: v. "
        "Both must come from one architecture"
    )
    two = TaskVector({"w": torch.ones(2)})
    assert error_of(one.__sub__, two) == (
        "the second task vector has other shapes than the first: w (2,) instead of (1,)"
    )


@given(st.lists(st.lists(st.floats(-100, 100, width=32), max_size=5), max_size=4))
def test_norm_and_numel_are_those_of_the_flattened_vector(values):
    vector = TaskVector({str(i): torch.tensor(row) for i, row in enumerate(values)})
    flat = [value for row in values for value in row]
    assert vector.numel() == len(flat)
    assert vector.norm() == pytest.approx(math.hypot(*flat), rel=1e-5, abs=1e-30)


def test_it_is_a_mapping_that_shows_its_size():
    vector = TaskVector({"w": torch.ones(40, 30), "b": torch.ones(3)})
    assert dict(vector).keys() == {"w", "b"}
    assert len(vector) == 2
    assert "w" in vector
    assert repr(vector) == "TaskVector(2 tensors, 1,203 values)"


def test_a_saved_task_vector_comes_back_with_its_metadata(tmp_path):
    path = tmp_path / "runs" / "task0.safetensors"
    metadata = {"task": "birds", "format": "pt", "version": "7"}
    vector = TaskVector(TaskVector.between(weights(0), weights(1)), metadata)
    vector.save(path)
    loaded = TaskVector.load(path)
    assert loaded == vector
    assert loaded.metadata == metadata


def test_a_file_that_holds_no_task_vector_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.ones(1)}, {"format": "pt"})
    assert error_of(TaskVector.load, path) == (
        f"'{path}' holds no task vector; if it holds weights, subtract the base from them: "
        "TaskVector.between(base, tuned)"
    )


def test_a_file_of_a_newer_version_is_an_error(tmp_path):
    path = tmp_path / "task0.safetensors"
    save_tensors(path, {"w": torch.ones(1)}, {"cl_merge.task_vector": "3"})
    assert error_of(TaskVector.load, path) == (
        f"'{path}' is a task vector of version 3, but this cl_merge reads versions 1 and 2; "
        "update cl_merge"
    )
