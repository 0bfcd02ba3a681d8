"""NaN, infinity and overflow: one error that names file and tensor, and nothing is left."""

import math

import pytest
import torch
from file_cases import METHODS, listed, write

from cl_merge import kernels
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import MERGERS
from cl_merge.task_vectors.task_vector import TaskVector

ADVICE = (
    "Training diverged or a file is damaged: leave it out, or train again, for example with a "
    "lower learning rate"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]
STORES = ["safetensors", "shards", "pt", "ckpt"]


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)


def weights(dtype=torch.float32, **changes):
    found = {name: torch.linspace(-1, 1, 50).to(dtype) for name in ("a", "b", "c")}
    for name, value in changes.items():
        found[name][17] = value
    return found


def refused(tmp_path, out, base, *tasks, **options):
    for name in ("m.safetensors", "folder"):
        with pytest.raises(InputError) as caught:
            merge_checkpoints(base, tasks, out / name, **options)
        assert listed(out) == []
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_a_task(tmp_path, out, loops, dtype, value):
    base = write(tmp_path, "base", weights(dtype), "safetensors")
    fine = write(tmp_path, "fine", weights(dtype), "safetensors")
    broken = write(tmp_path, "broken", weights(dtype, b=value, c=value), "pt")
    message = refused(tmp_path, out, base, fine, broken)
    assert message == f"'broken.pt': NaN or infinity in b, c. {ADVICE}"


@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_method(tmp_path, out, loops, method):
    base = {**weights(), "matrix": torch.zeros(3, 2)}
    importance = {name: tensor.abs() for name, tensor in base.items()}
    broken = write(tmp_path, "broken", {**base, **weights(c=math.nan)}, "safetensors")
    base = write(tmp_path, "base", base, "safetensors")
    beside = [base, base] if MERGERS[method].weighted else []
    importance = {"matrix": torch.eye(2)} if MERGERS[method].grams else importance
    beside = [write(tmp_path, str(i), importance, "pt") for i, _ in enumerate(beside)]
    message = refused(tmp_path, out, base, base, broken, method=method, importances=beside)
    assert message.startswith("'broken.safetensors': NaN or infinity in c. ")


@pytest.mark.parametrize("store", STORES)
def test_in_a_task_of_any_kind(tmp_path, out, store):
    base = write(tmp_path, "base", weights(), store)
    broken = write(tmp_path, "broken", weights(a=math.nan), store)
    assert "NaN or infinity in a. " in refused(tmp_path, out, base, broken)


def test_in_a_task_vector(tmp_path, out, loops):
    base = write(tmp_path, "base", weights(), "safetensors")
    TaskVector(weights(b=math.inf)).save(tmp_path / "vector.safetensors")
    message = refused(tmp_path, out, base, tmp_path / "vector.safetensors")
    assert message == f"'vector.safetensors': NaN or infinity in b. {ADVICE}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("store", ["safetensors", "task vector"])
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_in_the_base(tmp_path, out, loops, value, store, dtype):
    base = write(tmp_path, "base", weights(dtype, a=value), "safetensors")
    tasks = [
        write(tmp_path, f"task{i}", weights(dtype), store, weights(dtype, b=0.5)) for i in (0, 1)
    ]
    assert refused(tmp_path, out, base, *tasks) == (
        "the base 'base.safetensors': NaN or infinity in a. If they are meant to be there, do not "
        "merge these tensors (exclude); else the file is damaged"
    )


def test_in_a_tensor_that_is_not_merged_they_are_kept(tmp_path, out):
    """Attention masks of infinities, for example."""
    base = write(tmp_path, "base", weights(a=-math.inf), "safetensors")
    merge_checkpoints(base, [base], out / "m.safetensors", exclude=["a"])
    assert listed(out) == ["m.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.float32], ids=str)
def test_a_result_that_is_too_large(tmp_path, out, loops, dtype):
    most = torch.finfo(dtype).max
    base = write(tmp_path, "base", weights(dtype, b=most), "safetensors")
    TaskVector(weights(b=most)).save(tmp_path / "vector.safetensors")
    name = str(dtype).removeprefix("torch.")
    assert refused(tmp_path, out, base, tmp_path / "vector.safetensors", scale=1.0) == (
        f"'b' overflows {name} after merging; use a smaller scale, or a wider dtype"
    )


def test_a_difference_that_is_too_large(tmp_path, out, loops):
    most = torch.finfo(torch.float32).max
    base = write(tmp_path, "base", weights(b=-most), "safetensors")
    task = write(tmp_path, "task", weights(b=most), "safetensors")
    assert refused(tmp_path, out, base, task) == (
        "the difference of 'task.safetensors' and the base in float32: NaN or infinity in b. "
        + ADVICE
    )
    TaskVector({"a": torch.full((50,), 1e300, dtype=torch.float64)}).save(
        tmp_path / "vector.safetensors"
    )
    assert refused(tmp_path, out, base, tmp_path / "vector.safetensors") == (
        f"'vector.safetensors' in float32: NaN or infinity in a. {ADVICE}"
    )


def test_large_values_that_are_fine(tmp_path, out, loops):
    """Their sum overflows, they do not."""
    most = torch.finfo(torch.float32).max
    large = {"a": torch.full((50,), most / 2)}
    base = write(tmp_path, "base", {"a": torch.zeros(50)}, "safetensors")
    task = write(tmp_path, "task", large, "safetensors")
    merge_checkpoints(base, [task], out / "m.safetensors")
    assert listed(out) == ["m.safetensors"]
