"""Every mismatch is one clear error before anything is read or written."""

import math
from pathlib import Path

import pytest
import torch
from file_cases import listed, write

from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.inputs import Inputs
from cl_merge.task_vectors.task_vector import TaskVector


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    def fails(*_, **__):
        raise AssertionError("read before all checks were done")

    monkeypatch.setattr(Inputs, "read", fails)


@pytest.fixture
def small():
    return {"w": torch.zeros(2, 3), "b": torch.zeros(3), "n": torch.tensor(1)}


def refused(tmp_path, out, base, *tasks, **options):
    """The message of the error, paths cut to the names of the files."""
    with pytest.raises(InputError) as caught:
        merge_checkpoints(base, tasks, out / "m.safetensors", **options)
    assert listed(out) == []
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_tensors_that_are_missing_or_extra(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    other = {**{f"x{i}": small["b"] for i in range(6)}, "b": small["b"], "n": small["n"]}
    task = write(tmp_path, "task", other, "safetensors")
    assert refused(tmp_path, out, base, task) == (
        "'task.safetensors' has other tensors than the base 'base.safetensors'; missing: w; extra: "
        "x0, x1, x2, x3 and 2 more. Both must come from one architecture"
    )


def test_names_that_differ_by_a_prefix_only(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    wrapped = {f"model.{name}": tensor for name, tensor in small.items()}
    task = write(tmp_path, "task", wrapped, "safetensors")
    assert refused(tmp_path, out, base, task) == (
        "'task.safetensors' has other tensors than the base 'base.safetensors'; missing: b, w; "
        "extra: model.b, model.w. Names in 'task.safetensors' begin with 'model.': save "
        "both in one way, or give strip_prefix. Both must come from one architecture"
    )
    message = refused(tmp_path, out, task, base)
    assert (
        "Names in the base 'task.safetensors' begin with 'model.': save both in one way." in message
    )


def test_a_prefix_beside_other_names_is_noticed_too(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    wrapped = {f"model.{name}": tensor for name, tensor in small.items()}
    task = write(tmp_path, "task", {"loss.weight": small["w"], **wrapped}, "safetensors")
    message = refused(tmp_path, out, base, task)
    assert "Names in 'task.safetensors' begin with 'model.': save both in one way, or " in message
    message = refused(tmp_path, out, base, task, strip_prefix="model.")
    assert "missing: none; extra: loss.weight. Both must" in message


@pytest.mark.parametrize("names", [["w"], ["w", "b"]])
def test_a_prefix_of_a_part_of_the_names_is_noticed_too(tmp_path, out, small, names):
    base = write(tmp_path, "base", small, "safetensors")
    task = tmp_path / "task.safetensors"
    TaskVector({f"model.{name}": torch.zeros(small[name].shape) for name in names}).save(task)
    message = refused(tmp_path, out, base, task)
    assert "Names in 'task.safetensors' begin with 'model.': save both in one way, or " in message


def test_other_shapes(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    task = write(tmp_path, "task", {**small, "w": torch.zeros(3, 2)}, "pt")
    assert refused(tmp_path, out, base, task) == (
        "'task.pt' has other shapes than the base 'base.safetensors': w (3, 2) instead of (2, 3); "
        "exclude what is not to be merged"
    )


def test_integers_in_place_of_numbers_that_train(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    task = write(
        tmp_path, "task", {**small, "w": small["w"].long(), "b": small["b"].half()}, "shards"
    )
    assert refused(tmp_path, out, base, task) == (
        "'task' has other dtypes than the base 'base.safetensors': w int64 instead of float32. "
        "Convert one of the two"
    )


def test_a_task_vector_of_another_model(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    path = tmp_path / "task.safetensors"
    TaskVector({"w": torch.zeros(2, 3), "v": torch.zeros(2)}).save(path)
    assert refused(tmp_path, out, base, path) == (
        "'task.safetensors' has other tensors than the base 'base.safetensors'; missing: none; "
        "extra: v. Both must come from one architecture"
    )
    TaskVector({"w": torch.zeros(3)}).save(path)
    assert refused(tmp_path, out, base, path) == (
        "'task.safetensors' has other shapes than the base 'base.safetensors': w (3,) instead of "
        "(2, 3); exclude what is not to be merged"
    )
    TaskVector({"n": torch.tensor(1.0)}).save(path)
    assert refused(tmp_path, out, base, path) == (
        "'task.safetensors' changes tensors that the base 'base.safetensors' has as integers: n. It "
        "must be the model that the task vector was made with"
    )


@pytest.mark.parametrize("first", ["w", "wb", ""])
def test_task_vectors_of_different_parts(tmp_path, out, small, first):
    base = write(tmp_path, "base", small, "safetensors")
    paths = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    TaskVector({name: small[name] for name in first}).save(paths[0])
    TaskVector({"b": small["b"]}).save(paths[1])
    lists = {"w": ("w", "b"), "wb": ("w", "none"), "": ("none", "b")}[first]
    message = "'two.safetensors' changes other tensors than 'one.safetensors'; missing: {}; extra: "
    assert refused(tmp_path, out, base, *paths).startswith(
        message.format(lists[0]) + f"{lists[1]}. Choose those of both with include"
    )


def test_a_task_vector_as_base(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    vector = write(tmp_path, "vector", small, "task vector", small)
    assert refused(tmp_path, out, vector, base) == (
        "'vector.safetensors' is a task vector, but the base must hold the weights before "
        "fine-tuning"
    )


def test_nothing_that_could_be_merged(tmp_path, out):
    base = write(tmp_path, "base", {"n": torch.tensor(1)}, "pt")
    assert refused(tmp_path, out, base, base) == (
        "nothing to merge: 'base.pt' holds no floating-point parameter"
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_one_path_where_several_are_wanted(tmp_path, out, small, kind):
    base = write(tmp_path, "base", small, "safetensors")
    for key in ("tasks", "importances"):
        with pytest.raises(InputError, match=rf"^{key} must be a list of files, as in \['"):
            merge_checkpoints(base, **{"tasks": [base], "output": out / "o", key: kind(base)})


def test_no_task(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    assert refused(tmp_path, out, base) == (
        "no task to merge; give at least one checkpoint or task vector"
    )


def test_an_unknown_method_or_option_or_value(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    message = refused(tmp_path, out, base, base, method="tie")
    assert message.startswith("unknown method 'tie'; did you mean 'ties'? Known: magmax, ")
    message = refused(tmp_path, out, base, base, method="ties", densty=0.3)
    assert message == (
        "unknown option of method 'ties' 'densty'; did you mean 'density'? Known: density, per_parameter, sign, combine, task_weights"
    )
    message = refused(tmp_path, out, base, base, method="ties", density=0)
    assert message == "density must be a number above 0 and at most 1, not 0"


def test_a_pattern_that_fits_nothing(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    for options in ({"include": ["visual*"]}, {"exclude": ["x"]}, {"scale": {"x": 0.5}}):
        message = refused(tmp_path, out, base, base, **options)
        assert "' fits no parameter" in message
        assert next(iter(options)) in message
    message = refused(tmp_path, out, base, base, include=["w"], exclude=["w"])
    assert message == "include=w and exclude=w leave no parameter to merge"


@pytest.mark.parametrize("scale", [math.nan, math.inf, "0.5", True])
def test_a_scale_that_is_no_finite_number(tmp_path, out, small, scale):
    base = write(tmp_path, "base", small, "safetensors")
    expected = f"the scale must be a finite number, not {scale!r}"
    assert refused(tmp_path, out, base, base, scale=scale) == expected
    message = refused(tmp_path, out, base, base, scale={"w": scale})
    assert message == f"'w': {expected}"


def test_importances_that_are_not_asked_for(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    assert refused(tmp_path, out, base, base, importances=[base]) == (
        "'magmax' takes no importances; leave them out"
    )


def test_an_output_that_is_an_input_or_within_one(tmp_path, small):
    base = write(tmp_path, "base", small, "safetensors")
    task = write(tmp_path, "task", small, "shards")
    link = tmp_path / "link.safetensors"
    link.symlink_to(base)
    before = listed(tmp_path)
    for output, source in ((base, base), (link, base), (task, task), (task / "new", task)):
        with pytest.raises(InputError) as caught:
            merge_checkpoints(base, [task], output, overwrite=True)
        assert str(caught.value) == (
            f"the output '{output}' is, or lies within, the input '{source}'; give another place"
        )
    assert listed(tmp_path) == before


def test_an_input_that_is_missing_or_damaged(tmp_path, out, small):
    base = write(tmp_path, "base", small, "safetensors")
    assert refused(tmp_path, out, base, tmp_path / "no.pt") == (
        "there is no file or folder 'no.pt'; check the path"
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base.read_bytes()[:-1])
    assert refused(tmp_path, out, base, cut).startswith(
        "'cut.safetensors' is not a whole safetensors file"
    )


def test_an_output_folder_that_holds_something(tmp_path, small):
    base = write(tmp_path, "base", small, "safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; give a new or an empty folder"):
        merge_checkpoints(base, [base], tmp_path / "full", overwrite=True)
    assert listed(tmp_path / "full") == ["mine.txt"]
