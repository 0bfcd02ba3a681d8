"""The figures of an inspection are those of a naive computation in float64."""

import math
from pathlib import Path

import pytest
import torch
from file_cases import LAYOUTS, STORES, random_weights, tuned, write
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_merge.analysis import sign_conflicts
from cl_merge.errors import InputError
from cl_merge.merge_files.inspection import inspect_checkpoints
from cl_merge.task_vectors.task_vector import TaskVector


def naive(vectors):
    """Norms, zeros, largest magnitudes, cosines and sign conflicts, from whole vectors."""
    flat = torch.stack([torch.cat([v[n].reshape(-1).double() for n in sorted(v)]) for v in vectors])
    norms = flat.square().sum(dim=1).sqrt()
    up, down = (flat > 0).any(dim=0), (flat < 0).any(dim=0)
    moved = int((up | down).sum())
    return {
        "norms": norms.tolist(),
        "zeros": [float((v == 0).double().mean()) if v.numel() else math.nan for v in flat],
        "largest": flat.abs().amax(dim=1).tolist() if flat.shape[1] else None,
        "cosines": (flat @ flat.T / norms[:, None] / norms[None, :]).tolist(),
        "conflicts": int((up & down).sum()) / moved if moved else math.nan,
    }


def close(value):
    return pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True)


def check_figures(found, vectors, density=0.2):
    expected = naive(vectors)
    assert found.fine
    if expected["largest"] is None:
        assert all(math.isnan(file.norm) for file in found.files)
        return
    assert [file.norm for file in found.files] == close(expected["norms"])
    assert [file.zeros for file in found.files] == close(expected["zeros"])
    assert [file.largest for file in found.files] == close(expected["largest"])
    for row, wanted in zip(found.cosines, expected["cosines"], strict=True):
        assert row == close(wanted)
    assert found.conflicts == close(expected["conflicts"])
    assert found.top_conflicts == close(sign_conflicts(vectors, density))
    for file, vector in zip(found.files, vectors, strict=True):
        norms = {n: float(t.double().norm()) for n, t in vector.items() if t.numel()}
        assert file.layers == close(norms)


@settings(max_examples=40)
@given(
    layout=LAYOUTS,
    stores=st.lists(st.sampled_from(STORES), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    density=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    block=st.sampled_from([1, 10, 1 << 22]),
)
def test_figures_of_task_vectors(tmp_path_factory, layout, stores, seed, density, block):
    folder = tmp_path_factory.mktemp("inspect")
    base = random_weights(layout, seed)
    weights = [tuned(base, 100 * seed + i) for i in range(len(stores))]
    files = [
        write(folder, f"task{i}", task, store, base)
        for i, (task, store) in enumerate(zip(weights, stores, strict=True))
    ]
    vectors = [
        TaskVector.load(file)
        if store in ("task vector", "int8")
        else TaskVector.between(base, task)
        for file, store, task in zip(files, stores, weights, strict=True)
    ]
    base_file = write(folder, "base", base, "pt")
    found = inspect_checkpoints(files, base_file, density=density, block_size=block)
    check_figures(found, vectors, density)
    size = math.sqrt(sum(float(base[n].double().square().sum()) for n in vectors[0]))
    if size and found.compared:
        ratios = [file.norm / size for file in found.files]
        assert [file.relative for file in found.files] == close(ratios)


def test_figures_with_two_threads_are_the_same(files, two_threads):
    base, tasks = files
    threaded = inspect_checkpoints(tasks, base, block_size=64)
    torch.set_num_threads(1)
    assert threaded == inspect_checkpoints(tasks, base, block_size=64)


def test_figures_of_weights_without_a_base(files, tasks):
    found = inspect_checkpoints(files[1])
    floats = [{n: t for n, t in task.items() if t.is_floating_point()} for task in tasks]
    check_figures(found, [TaskVector(each) for each in floats])
    assert not found.are_changes
    assert found.base is None


def test_figures_of_task_vectors_without_a_base(tmp_path, base, tasks):
    files = [write(tmp_path, str(i), task, "task vector", base) for i, task in enumerate(tasks)]
    found = inspect_checkpoints(files)
    check_figures(found, [TaskVector.between(base, task) for task in tasks])
    assert found.are_changes


def test_what_each_file_holds(files, base):
    (found, *_) = inspect_checkpoints(files[1], files[0]).files
    assert found.path == files[1][0]
    assert found.kind == "safetensors"
    assert found.tensors == len(base)
    assert found.parameters == sum(t.numel() for t in base.values() if t.is_floating_point())
    assert found.dtypes == ["bfloat16", "bool", "float16", "float32", "float64", "int64"]


@pytest.mark.parametrize("against", ["base", "first file"])
def test_what_differs_is_named_and_left_out_of_the_figures(tmp_path, against):
    base = {"a": torch.ones(4), "b c": torch.ones(3), "d": torch.ones(2), "n": torch.tensor(1)}
    odd = {
        "a": torch.full((4,), 3.0),
        "b c": torch.ones(4),
        "d": torch.ones(2).int(),
        "e": base["d"],
    }
    first = write(tmp_path, "first", base, "safetensors")
    other = write(tmp_path, "odd", odd, "pt")
    files, reference = ([other], first) if against == "base" else ([first, other], None)
    found = inspect_checkpoints(files, reference)
    report = found.files[-1]
    assert report.missing == []  # integers are not merged
    assert report.extra == ["e"]
    assert sorted(report.shapes) == ["b c (4,) instead of (3,)", "d int32 instead of float32"]
    assert found.compared == 1
    assert report.norm == pytest.approx(4.0 if against == "base" else 6.0)
    assert not found.fine


def test_task_vectors_of_different_parts_are_told(tmp_path):
    base = write(tmp_path, "base", {n: torch.ones(3) for n in "abc"}, "safetensors")
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, names in zip(paths, ("ab", "bc"), strict=True):
        TaskVector({name: torch.ones(3) for name in names}).save(path)
    found = inspect_checkpoints(paths, base)
    assert found.files[1].uneven == ["a", "c"]
    assert found.files[1].missing == []
    assert (found.compared, found.fine) == (1, False)
    assert inspect_checkpoints(paths[:1], base).fine


def test_a_task_vector_of_what_the_base_has_as_integers_is_told(tmp_path):
    base = write(tmp_path, "base", {"a": torch.ones(3), "n": torch.tensor([1])}, "safetensors")
    TaskVector({"a": torch.ones(3), "n": torch.ones(1)}).save(tmp_path / "v.safetensors")
    found = inspect_checkpoints([tmp_path / "v.safetensors"], base)
    assert found.files[0].shapes == ["n float32 instead of int64"]
    assert not found.fine


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_named_and_count_as_zero(tmp_path, value):
    base = {"a": torch.zeros(5), "b": torch.zeros(3)}
    task = {"a": torch.tensor([1.0, -2, 0, 0, value]), "b": torch.ones(3)}
    files = [write(tmp_path, n, w, "safetensors") for n, w in (("base", base), ("task", task))]
    found = inspect_checkpoints([files[1], files[0]], files[0])
    assert found.files[0].not_finite == ["a"]
    assert found.files[1].not_finite == []
    assert found.base_not_finite == []
    assert found.files[0].norm == pytest.approx(math.sqrt(8))
    assert found.files[0].zeros == 3 / 8
    assert not found.fine


def test_nan_in_the_base_is_the_bases(tmp_path):
    base = {"a": torch.tensor([1.0, math.nan]), "b": torch.zeros(3)}
    task = {"a": torch.tensor([2.0, 5.0]), "b": torch.ones(3)}
    files = [write(tmp_path, n, w, "pt") for n, w in (("base", base), ("task", task))]
    found = inspect_checkpoints(files[1:], files[0])
    assert found.base_not_finite == ["a"]
    assert found.files[0].not_finite == []
    assert (found.files[0].norm, found.files[0].relative) == pytest.approx((2.0, 2.0))
    assert not found.fine


def test_wrong_arguments(files):
    base, tasks = files
    for density in (0, -1, 1.1, math.nan):
        with pytest.raises(InputError, match="the density must be above 0 and at most 1, not"):
            inspect_checkpoints(tasks, base, density=density)
    for one in ("no.pt", Path("no.pt")):
        with pytest.raises(InputError, match=r"tasks must be a list of files, as in \['no\.pt'\]"):
            inspect_checkpoints(one)
    with pytest.raises(InputError, match="nothing to inspect"):
        inspect_checkpoints([])
    with pytest.raises(InputError, match="there is no file or folder 'no.pt'"):
        inspect_checkpoints(["no.pt"])
    vector = base.with_name("vector.safetensors")
    TaskVector({"weight": torch.ones(40, 30)}).save(vector)
    with pytest.raises(InputError, match="is a task vector, but the base must hold"):
        inspect_checkpoints(tasks, vector)


def test_what_is_read_is_what_was_announced(files):
    total, told = [], []

    def progress(size):
        total.append(size)
        return told.append

    inspect_checkpoints(files[1], files[0], progress=progress)
    assert total == [sum(told)]
