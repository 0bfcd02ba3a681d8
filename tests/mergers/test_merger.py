"""What all mergers do around their rules: checks, copies, state, the registry."""

import io
import math

import pytest
import torch
from merger_cases import ANY_NUMBER

from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import (
    MERGERS,
    Average,
    MaxMagnitude,
    RandomMix,
    Ties,
    get_merger,
    merge,
)
from cl_merge.task_vectors.task_vector import TaskVector

METHODS = pytest.mark.parametrize("method", ANY_NUMBER)


def vector(*values: float) -> TaskVector:
    return TaskVector({"w": torch.tensor(values, dtype=torch.float32)})


def error_of(function, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    return str(caught.value)


def same_bits(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)) for name in one
    )


# Results and what they share.


@METHODS
def test_what_was_given_is_neither_changed_nor_kept(method, make_vector):
    given, untouched = make_vector(0), make_vector(0)
    given = {name: tensor.contiguous() for name, tensor in given.items()}
    merger = get_merger(method)
    merger.update(given)
    assert all(torch.equal(given[name], untouched[name]) for name in given)
    before = merger.merged()
    for tensor in given.values():
        tensor.fill_(9)
    assert same_bits(merger.merged(), before)


@METHODS
def test_changing_a_result_does_not_change_the_merger(method, make_vector):
    merger = get_merger(method)
    merger.update(make_vector(0))
    first = merger.merged()
    for _, tensor in merger.items():
        tensor.fill_(9)
    assert same_bits(merger.merged(), first)


@METHODS
def test_results_may_be_read_between_tasks(method, make_vector):
    vectors = [make_vector(seed) for seed in range(3)]
    merger = get_merger(method)
    for count, given in enumerate(vectors, start=1):
        merger.update(given)
        assert merger.tasks == count
        assert same_bits(merger.merged(), merge(vectors[:count], method))


@METHODS
def test_parameters_in_training_can_be_folded(method):
    merger = get_merger(method)
    merger.update(dict(torch.nn.Linear(3, 2).named_parameters()))
    assert not any(tensor.requires_grad for _, tensor in merger.items())


@METHODS
def test_inference_mode_makes_no_difference(method, make_vector):
    vectors = [make_vector(seed) for seed in range(3)]
    merger = get_merger(method)
    with torch.inference_mode():
        merger.update(vectors[0])
    merger.update(vectors[1])
    with torch.inference_mode():
        merger.update(vectors[2])
        merged = merger.merged()
    assert same_bits(merged, merge(vectors, method))
    assert not any(tensor.is_inference() for tensor in merged.values())


def test_merge_holds_one_vector_of_a_generator_at_a_time():
    alive = 0

    class Counted(TaskVector):
        def __init__(self, *args):
            nonlocal alive
            alive += 1
            assert alive == 1
            super().__init__(*args)

        def __del__(self):
            nonlocal alive
            alive -= 1

    merged = merge(Counted({"w": torch.ones(2)}) for _ in range(4))
    assert merged["w"].tolist() == [1, 1]


def test_a_merged_vector_tells_how_it_was_made():
    assert merge([vector(1), vector(2)], "max-abs").metadata == {
        "method": "max-abs",
        "options": "{}",
        "tasks": "2",
    }
    assert (
        merge([vector(1)], "ties", density=1).metadata["options"]
        == '{"density": 1.0, "per_parameter": false, "sign": "value", "combine": "mean", "task_weights": null}'
    )
    assert merge([vector(1)], "random-mix").metadata["options"] == '{"seed": 0}'


def test_a_merged_vector_can_be_saved(tmp_path):
    merged = merge([vector(1, 2), vector(-3, 1)])
    merged.save(tmp_path / "merged.safetensors")
    loaded = TaskVector.load(tmp_path / "merged.safetensors")
    assert loaded == merged
    assert loaded.metadata == merged.metadata


# The registry.


def test_every_method_has_the_scale_it_was_published_with():
    assert {method: get_merger(method).published_scale for method in MERGERS} == {
        "magmax": 0.5,
        "max-abs": 0.5,
        "average": 1.0,
        "task-arithmetic": 0.4,
        "random-mix": 1.0,
        "ties": 0.55,
        "dare": 0.4,
        "dare-ties": 0.55,
        "della": 0.55,
        "breadcrumbs": 0.4,
        "consensus": 0.4,
        "emr": 1.0,
        "ema": 1.0,
        "fisher": 1.0,
        "regmean": 1.0,
        "opcm": 1.0,
        "iso-c": 1.0,
        "iso-cts": 1.0,
        "tsv": 1.0,
        "wudi": 1.0,
        "nufilt": 1.0,
        "dop": 1.0,
        "model-stock": 1.0,
        "sce": 1.0,
        "karcher": 1.0,
        "slerp": 1.0,
    }


def test_an_unknown_method_is_an_error_that_names_the_nearest():
    message = f"unknown method 'magmix'; did you mean 'magmax'? Known: {', '.join(MERGERS)}"
    assert error_of(get_merger, "magmix") == message
    assert error_of(merge, [vector(1)], method="magmix") == message


def test_an_unknown_option_is_an_error_that_names_the_nearest():
    assert error_of(get_merger, "ties", densty=0.2) == (
        "unknown option of method 'ties' 'densty'; did you mean 'density'? Known: density, per_parameter, sign, combine, task_weights"
    )
    assert error_of(get_merger, "magmax", density=0.2) == (
        "unknown option of method 'magmax' 'density'. Known: none"
    )


@pytest.mark.parametrize("density", [0, -0.1, 1.1, math.nan, math.inf, "0.2", None, True])
def test_a_density_outside_its_range_is_an_error(density):
    or_a_list = ", or a list of them, as in [0.5,0.3]" if isinstance(density, str) else ""
    assert error_of(Ties, density=density) == (
        f"density must be a number above 0 and at most 1{or_a_list}, not {density!r}"
    )


@pytest.mark.parametrize("seed", [0.5, "1", None, True])
def test_a_seed_that_is_no_whole_number_is_an_error(seed):
    assert error_of(RandomMix, seed=seed) == f"seed must be a whole number, not {seed!r}"


# Bad task vectors.


def test_merging_nothing_is_an_error():
    assert error_of(merge, []) == "no task vector to merge; give at least one"
    message = "nothing to merge: 'magmax' was given no task vector"
    assert error_of(MaxMagnitude().merged) == message
    assert error_of(lambda: list(MaxMagnitude().items())) == message


@METHODS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named_and_nothing_is_folded(method, value):
    good = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    bad = {"a": torch.ones(3), "b": torch.tensor([[1.0, value], [1.0, 1.0]])}
    merger = get_merger(method)
    for _ in range(3):
        merger.update(good)
    before = merger.merged()
    assert error_of(merger.update, bad) == (
        "task 3 (the 4th): NaN or infinity in b. Training diverged or a file is damaged: leave it out, or "
        "train again, for example with a lower learning rate"
    )
    assert merger.tasks == 3
    assert same_bits(merger.merged(), before)
    merger.update(good)
    assert merger.tasks == 4


def test_values_that_overflow_float32_are_not_finite():
    wide = {"w": torch.tensor([1e300], dtype=torch.float64)}
    assert error_of(MaxMagnitude().update, wide).startswith(
        "task 0 (the 1st): NaN or infinity in w."
    )


def test_large_values_whose_sum_overflows_are_fine():
    assert merge([vector(3e38, 3e38)])["w"].tolist() == vector(3e38, 3e38)["w"].tolist()


@METHODS
def test_names_that_differ_from_earlier_tasks_are_listed(method):
    merger = get_merger(method)
    merger.update({name: torch.ones(1) for name in "abcdef"})
    assert error_of(merger.update, {name: torch.ones(1) for name in "fx"}) == (
        "task 1 (the 2nd) has other tensors than the tasks before; missing: a, b, c, d and 1 more; "
        "extra: x. Both must come from one architecture"
    )
    assert merger.tasks == 1


@METHODS
def test_shapes_that_differ_from_earlier_tasks_are_listed(method):
    merger = get_merger(method)
    merger.update({"w": torch.ones(2, 3)})
    assert error_of(merger.update, {"w": torch.ones(3, 2)}) == (
        "task 1 (the 2nd) has other shapes than the tasks before: w (3, 2) instead of (2, 3)"
    )


def test_integer_tensors_are_never_merged():
    assert error_of(MaxMagnitude().update, {"steps": torch.tensor([1])}) == (
        "task 0 (the 1st) holds floating-point tensors only; leave out steps (torch.int64)"
    )


def test_ties_does_not_count_past_the_range_of_its_counters():
    class FewTasks(Ties):
        most_tasks = 2

    assert error_of(merge, [vector(1)] * 3, FewTasks()) == (
        "'ties' counts up to 2 tasks; merge them in groups"
    )


def test_a_model_without_tensors_is_counted():
    merger = Average()
    merger.update({})
    merger.update({})
    assert merger.tasks == 2
    assert list(merger.items()) == []
    assert "extra: w" in error_of(merger.update, vector(1))


# State.


@METHODS
def test_a_saved_state_goes_on_bit_for_bit(method, make_vector):
    vectors = [make_vector(seed) for seed in range(4)]
    first = get_merger(method)
    for given in vectors[:2]:
        first.update(given)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = get_merger(method)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.tasks == 2
    for given in vectors[2:]:
        second.update(given)
    assert same_bits(second.merged(), merge(vectors, method))


@METHODS
def test_a_loaded_state_is_a_copy(method, make_vector):
    one, two = get_merger(method), get_merger(method)
    one.update(make_vector(0))
    two.load_state_dict(one.state_dict())
    before = one.merged()
    two.update(make_vector(1))
    assert same_bits(one.merged(), before)


def test_the_state_of_before_an_option_came_is_that_of_its_default():
    before = Ties(density=0.3)
    before.update(vector(1))
    state = before.state_dict() | {"options": {"density": 0.3}}
    Ties(density=0.3).load_state_dict(state)
    with pytest.raises(InputError, match="make it with the saved ones"):
        Ties(density=0.3, per_parameter=True).load_state_dict(state)


def test_the_state_of_another_method_is_an_error():
    state = Ties(density=0.3).state_dict()
    assert error_of(MaxMagnitude().load_state_dict, state) == (
        "the saved state is of method 'ties' with options {'density': 0.3, 'per_parameter': False, 'sign': 'value', 'combine': 'mean', 'task_weights': None}, but this merger is "
        "'magmax' with options {}; make it with the saved ones"
    )
    assert error_of(Ties().load_state_dict, state) == (
        "the saved state is of method 'ties' with options {'density': 0.3, 'per_parameter': False, 'sign': 'value', 'combine': 'mean', 'task_weights': None}, but this merger is "
        "'ties' with options {'density': 0.2, 'per_parameter': False, 'sign': 'value', 'combine': 'mean', 'task_weights': None}; make it with the saved ones"
    )


def test_an_empty_state_can_be_loaded():
    merger = MaxMagnitude()
    merger.load_state_dict(MaxMagnitude().state_dict())
    merger.update(vector(1))
    assert merger.tasks == 1


# Devices.


@METHODS
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_device_changes_no_bit(method, make_vector):
    vectors = [make_vector(seed) for seed in range(3)]
    there = [{name: tensor.cuda() for name, tensor in given.items()} for given in vectors]
    merged = merge(there, method)
    assert all(tensor.is_cuda for tensor in merged.values())
    here = {name: tensor.cpu() for name, tensor in merged.items()}
    assert same_bits(here, merge(vectors, method))
    assert same_bits(merge([vectors[0], *there[1:]], method), merge(vectors, method))


# What names a method.


@pytest.mark.parametrize("method", [Ties(density=1), Ties, "ties"], ids=["ready", "class", "name"])
def test_a_method_is_a_name_a_class_or_a_merger_that_is_ready(method):
    merged = merge([vector(1.0, -3.0), vector(3.0, 1.0)], method)
    assert merged.metadata["method"] == "ties"
    assert float(merged["w"][0]) in (2.0, 3.0)


def test_options_beside_a_ready_merger_are_refused():
    message = (
        "option density beside a ready Merger 'ties', which has its own; give options where it is "
        "made, or beside its name, 'ties'"
    )
    assert error_of(merge, [vector(1)], Ties(), density=0.3) == message
    assert error_of(merge_checkpoints, "a", ["b"], "c", method=Ties(), density=0.3) == message
    assert error_of(MergeCallback, Ties(), density=0.3) == message


def test_options_of_a_class_are_checked():
    assert (
        merge([vector(1)], Ties, density=1).metadata["options"]
        == '{"density": 1.0, "per_parameter": false, "sign": "value", "combine": "mean", "task_weights": null}'
    )
    assert error_of(merge, [vector(1)], Ties, densty=1).startswith(
        "unknown option of method 'ties' 'densty'; did you mean 'density'?"
    )


def test_a_merger_that_holds_tasks_is_refused():
    used = MaxMagnitude()
    used.update(vector(1))
    message = "the Merger 'magmax' has folded 1 task vector already; give a fresh one"
    assert error_of(merge, [vector(1)], used) == message
    assert error_of(merge_checkpoints, "a", ["b"], "c", method=used) == message


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("linear", "average"), ("dare_linear", "dare"), ("dare_ties", "dare-ties")],
)
def test_methods_are_known_by_the_names_of_other_libraries(theirs, ours):
    assert type(get_merger(theirs)) is type(get_merger(ours))
    assert get_merger("task_arithmetic").name == "task-arithmetic"
