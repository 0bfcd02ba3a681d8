"""Merging files gives what merging in memory gives, bit for bit, whatever the files."""

import threading
import time

import pytest
import torch
from file_cases import (
    FLOATS,
    LAYOUTS,
    METHODS,
    STORES,
    grams_of,
    in_memory,
    listed,
    random_weights,
    read,
    same_bits,
    tuned,
    write,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cl_merge import kernels
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.hashing import ContentHash
from cl_merge.mergers import MERGERS, MaxMagnitude, get_merger, merge
from cl_merge.mergers.chunks import chunk_size
from cl_merge.mergers.stack import StackMerger
from cl_merge.storage import Weights
from cl_merge.task_vectors.task_vector import TaskVector

any_method = pytest.mark.parametrize("method", METHODS)


def number_of_tasks(method):
    return 2 if method == "slerp" else 3


def importances_of(method, base, number):
    """Importances where a method wants them: what trains, never negative; or Gram matrices."""
    if not MERGERS[method].weighted:
        return []
    if MERGERS[method].grams:
        return [grams_of(base, seed) for seed in range(number)]
    return [
        {n: (t.float() + i).abs() for n, t in base.items() if t.is_floating_point()}
        for i in range(number)
    ]


@any_method
@settings(max_examples=8)
@given(layout=LAYOUTS, data=st.data(), seed=st.integers(0, 99), scale=st.floats(-2, 2))
@pytest.mark.slow
def test_files_merge_as_memory_does(tmp_path_factory, method, layout, data, seed, scale):
    folder = tmp_path_factory.mktemp("merge")
    base = random_weights(layout, seed)
    weights = [tuned(base, 100 * seed + i) for i in range(number_of_tasks(method))]
    stores = [data.draw(st.sampled_from(STORES)) for _ in weights]
    files = [
        write(folder, f"task{i}", task, store, base)
        for i, (task, store) in enumerate(zip(weights, stores, strict=True))
    ]
    base_file = write(folder, "base", base, data.draw(st.sampled_from(STORES[:5])))
    importances = importances_of(method, base, len(weights))
    assume(all(importances))  # without a matrix there is nothing to weigh
    beside = [write(folder, f"f{i}", f, "safetensors") for i, f in enumerate(importances)]
    merge_checkpoints(
        base_file,
        files,
        folder / "out.safetensors",
        method=method,
        scale=scale,
        importances=beside,
    )
    tasks = [
        TaskVector.load(file) if store in ("task vector", "int8") else task
        for file, store, task in zip(files, stores, weights, strict=True)
    ]
    expected = in_memory(base, tasks, method, scale, importances)
    assert same_bits(read(folder / "out.safetensors"), expected)


@any_method
def test_the_published_scale_is_the_default(files, out, base, tasks, method):
    number = number_of_tasks(method)
    importances = importances_of(method, base, number)
    beside = [write(out / "beside", str(i), f, "pt") for i, f in enumerate(importances)]
    base_file, task_files = files
    merge_checkpoints(
        base_file,
        task_files[:number],
        out / "m.safetensors",
        method=method,
        importances=beside,
    )
    expected = in_memory(base, tasks[:number], method, importances=importances)
    assert same_bits(read(out / "m.safetensors"), expected)


@pytest.fixture
def outputs(files, out, base, two_threads):
    """Merge the same files by a method, once for each (block, chunk, threads); the outputs."""

    def outputs(method, *sizes):
        base_file, task_files = files
        task_files = task_files[: number_of_tasks(method)]
        importances = importances_of(method, base, len(task_files))
        beside = [write(out / "beside", str(i), f, "pt") for i, f in enumerate(importances)]
        paths = [out / f"{i}.safetensors" for i in range(len(sizes))]
        for path, (block, chunk, threads) in zip(paths, sizes, strict=True):
            torch.set_num_threads(threads)
            merger = get_merger(method)
            merger.chunk_size = chunk
            merge_checkpoints(
                base_file,
                task_files,
                path,
                method=merger,
                importances=beside,
                block_size=block,
            )
        return paths

    return outputs


@any_method
def test_chunks_and_threads_change_no_byte_of_the_output(outputs, method):
    paths = outputs(method, (1 << 22, 1 << 18, 1), (1 << 22, 7, 2), (1 << 22, 64, 1))
    whole, small, other = (path.read_bytes() for path in paths)
    assert whole == small == other


@any_method
def test_blocks_change_no_value_and_threads_no_byte_of_it(outputs, method):
    whole, two, one = outputs(method, (1 << 22, 1 << 18, 1), (50, 16, 2), (50, 50, 1))
    assert same_bits(read(whole), read(two))
    # The size of a block is a part of what the hashes mean.
    assert two.read_bytes() == one.read_bytes()


@any_method
@pytest.mark.skipif(kernels.library() is None, reason="needs a C compiler")
def test_compiled_loops_change_no_byte_of_the_output(files, out, base, method, monkeypatch):
    base_file, task_files = files
    task_files = task_files[: number_of_tasks(method)]
    importances = importances_of(method, base, len(task_files))
    beside = [write(out / "beside", str(i), f, "pt") for i, f in enumerate(importances)]
    fast, slow = out / "fast.safetensors", out / "slow.safetensors"
    merge_checkpoints(base_file, task_files, fast, method=method, importances=beside)
    monkeypatch.setenv("CL_MERGE_KERNELS", "0")
    kernels.library.cache_clear()
    try:
        merge_checkpoints(base_file, task_files, slow, method=method, importances=beside)
    finally:
        kernels.library.cache_clear()
    assert fast.read_bytes() == slow.read_bytes()


@pytest.mark.parametrize("store", [*STORES, "bf16", "int4", "int2"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kind_of_input_in_every_dtype(tmp_path, store, dtype):
    base = random_weights({"w": (dtype, (6, 5)), "b": (dtype, (6,))}, 1)
    weights = [tuned(base, seed) for seed in range(2)]
    base_file = write(tmp_path, "base", base, "ckpt")
    files = [write(tmp_path, f"task{i}", w, store, base) for i, w in enumerate(weights)]
    merge_checkpoints(base_file, files, tmp_path / "out", scale=0.7)
    rounded = store in ("task vector", "bf16", "int8", "int4", "int2")
    tasks = [TaskVector.load(file) for file in files] if rounded else weights
    assert same_bits(read(tmp_path / "out"), in_memory(base, tasks, "magmax", 0.7))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_one_byte_are_merged_too(tmp_path, dtype):
    base = {"w": (torch.arange(12.0) / 8).to(dtype), "b": torch.ones(3)}
    weights = [{"w": (torch.arange(12.0) / 4 - i).to(dtype), "b": base["b"] + i} for i in (0, 1)]
    base_file = write(tmp_path, "base", base, "safetensors")
    files = [write(tmp_path, f"task{i}", w, "safetensors") for i, w in enumerate(weights)]
    merge_checkpoints(base_file, files, tmp_path / "m.safetensors")
    assert same_bits(read(tmp_path / "m.safetensors"), in_memory(base, weights, "magmax"))


def test_tied_weights_are_written_under_both_names(tmp_path):
    shared = torch.randn(4, 3)
    base = {"embed": shared, "head": shared, "turned": shared.t()}
    changed = shared + 1
    task = {"embed": changed, "head": changed, "turned": changed.t()}
    base_file, file = (write(tmp_path, n, w, "pt") for n, w in (("base", base), ("task", task)))
    merge_checkpoints(base_file, [file], tmp_path / "m.safetensors", scale=1.0)
    assert same_bits(read(tmp_path / "m.safetensors"), in_memory(base, [task], "magmax", 1.0))


def test_a_rule_that_needs_all_tasks_at_once_is_given_smaller_chunks(tmp_path):
    seen = []

    class Noted(StackMerger):
        name, published_scale = "noted", 1.0

        def combine(self, values, info):
            seen.append(values.numel())
            return values[-1]

    files = [write(tmp_path, str(i), {"w": torch.full((1 << 19,), i)}, "pt") for i in (0.0, 1.0)]
    merge_checkpoints(files[0], files[1:] * 8, tmp_path / "m.safetensors", method=Noted())
    assert set(seen) == {chunk_size(torch.device("cpu"))}
    assert bool((read(tmp_path / "m.safetensors")["w"] == 1).all())


def test_the_first_look_at_few_tasks_takes_all_threads(tmp_path):
    seen = set()

    class Noted(MaxMagnitude):
        def prepare(self, vector):
            vector.map(self.note)

        def note(self, chunk):
            time.sleep(0.01)
            seen.add(threading.get_ident())

    weights = {str(i): torch.ones(2) for i in range(8)}
    base, task = (write(tmp_path, name, weights, "pt") for name in ("base", "task"))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        merge_checkpoints(base, [task, task], tmp_path / "m.safetensors", method=Noted())
    finally:
        torch.set_num_threads(before)
    assert len(seen) > 2


def test_a_part_of_a_larger_tensor_and_an_expanded_one_are_merged(tmp_path):
    large = torch.randn(10, 8)
    base = {
        "part": large[2:7, ::2],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "one": large[::10, 1],
    }
    task = {name: tensor + 1 for name, tensor in base.items()}
    base_file, file = (write(tmp_path, n, w, "pt") for n, w in (("base", base), ("task", task)))
    merge_checkpoints(base_file, [file, file], tmp_path / "m.safetensors")
    assert same_bits(read(tmp_path / "m.safetensors"), in_memory(base, [task, task], "magmax"))


def test_only_what_is_selected_is_merged(files, out, base, tasks):
    done = merge_checkpoints(
        *files, out / "m.safetensors", include=["w*", "bias"], exclude=["wide"]
    )
    merged = read(out / "m.safetensors")
    expected = in_memory(base, tasks, "magmax")
    chosen = {"weight", "bias"}
    assert same_bits(
        merged, {n: expected[n] if n in chosen else tensor for n, tensor in base.items()}
    )
    assert (done.merged, done.copied) == (2, len(base) - 2)


def test_scales_by_pattern(files, out, base, tasks):
    merge_checkpoints(*files, out / "m.safetensors", scale={"w*": 0.25, "*": 1.5})
    merged = read(out / "m.safetensors")
    low, high = (in_memory(base, tasks, "magmax", scale) for scale in (0.25, 1.5))
    assert same_bits(merged, {n: (low if n.startswith("w") else high)[n] for n in base})


def test_ties_trims_over_what_is_selected_only(files, out, base, tasks):
    merge_checkpoints(*files, out / "m.safetensors", method="ties", include=["weight"], density=0.1)
    part, changed = {"weight": base["weight"]}, [{"weight": t["weight"]} for t in tasks]
    expected = in_memory(part, changed, "ties", density=0.1)
    assert same_bits(read(out / "m.safetensors"), {**base, **expected})


def test_a_merger_object_and_options_do_the_same(files, out):
    paths = out / "1.safetensors", out / "2.safetensors"
    merge_checkpoints(*files, paths[0], method=get_merger("random-mix", seed=7))
    merge_checkpoints(*files, paths[1], method="random-mix", seed=7)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_one_task_at_scale_one_is_the_task(files, out, base, tasks):
    base_file, task_files = files
    merge_checkpoints(base_file, task_files[:1], out / "m.safetensors", scale=1.0)
    assert same_bits(read(out / "m.safetensors"), in_memory(base, tasks[:1], "magmax", 1.0))


def test_tied_votes_are_settled_by_the_whole_model(tmp_path):
    """TIES looks at all sums before it can finish a stretch whose sum is zero."""
    base = {"a": torch.zeros(4), "b": torch.zeros(6)}
    up = {"a": torch.tensor([1.0, -1, 2, 0]), "b": torch.tensor([1.0, 1, 1, 1, 1, 1])}
    down = {"a": torch.tensor([-1.0, 1, 2, 0]), "b": torch.tensor([1.0, 1, -1, 1, 1, 1])}
    base_file = write(tmp_path, "base", base, "safetensors")
    files = [write(tmp_path, str(i), w, "safetensors") for i, w in enumerate((up, down))]
    merge_checkpoints(base_file, files, tmp_path / "m.safetensors", method="ties", density=1.0)
    expected = in_memory(base, [up, down], "ties", density=1.0)
    assert same_bits(read(tmp_path / "m.safetensors"), expected)


def test_what_was_done_is_told(files, out, base):
    total, told = [], []

    def progress(size):
        total.append(size)
        return told.append

    done = merge_checkpoints(*files, out / "m.safetensors", method="ties", progress=progress)
    floats = [n for n, t in base.items() if t.is_floating_point()]
    assert (done.merged, done.copied) == (len(floats), len(base) - len(floats))
    assert done.path == out / "m.safetensors"
    assert total == [sum(told)]
    assert done.bytes_read >= sum(told)
    assert done.seconds > 0


def test_a_merge_that_fails_leaves_nothing(files, out, monkeypatch):
    def fails(*_):
        raise RuntimeError("halfway")

    monkeypatch.setattr(ContentHash, "hexdigest", fails)
    for name in ("m.safetensors", "folder"):
        with pytest.raises(RuntimeError, match="halfway"):
            merge_checkpoints(*files, out / name)
    assert listed(out) == []


def test_a_file_is_replaced_only_where_that_is_allowed(files, out):
    path = out / "m.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists; give another name"):
        merge_checkpoints(*files, path)
    assert path.read_bytes() == b"mine"
    merge_checkpoints(*files, path, overwrite=True)
    assert "weight" in read(path)
    assert listed(out) == ["m.safetensors"]


class Doubled(MaxMagnitude):
    """Folds in another way than the class that it derives from, which takes differences."""

    name = "doubled"

    def fold(self, state, chunk, info):
        super().fold(state, 2 * chunk, info)


def test_a_merger_that_folds_otherwise_is_given_tensors(files, out, base, tasks):
    base_file, task_files = files
    merge_checkpoints(base_file, task_files, out / "m.safetensors", method=Doubled(), scale=1.0)
    merge_checkpoints(base_file, task_files, out / "n.safetensors", method="magmax", scale=2.0)
    assert same_bits(read(out / "m.safetensors"), read(out / "n.safetensors"))


@pytest.mark.parametrize("method", ["magmax", "ties", "task-arithmetic", "slerp"])
@pytest.mark.parametrize("kind", ["safetensors", "task vector"])
def test_weights_multiply_task_vectors(tmp_path, method, kind):
    base = {"a": torch.randn(30, 20), "b": torch.randn(40)}
    tasks = [{n: t + torch.randn(t.shape) / 8 for n, t in base.items()} for _ in range(2)]
    files = [write(tmp_path, f"t{i}", t, kind, base) for i, t in enumerate(tasks)]
    before = write(tmp_path, "base", base, "safetensors")
    out = tmp_path / "out.safetensors"
    merge_checkpoints(before, files, out, method=method, weights=[2.0, -0.5])
    vectors = [
        TaskVector.between(base, task) * factor
        for task, factor in zip(tasks, (2.0, -0.5), strict=True)
    ]
    expected = merge(vectors, method).apply_to(base, get_merger(method).published_scale)
    found = load_file(out)
    assert all(torch.equal(found[name], expected[name]) for name in base)
    with pytest.raises(InputError, match="1 weights for 2 tasks; give one for each task"):
        merge_checkpoints(before, files, out, weights=[1.0], overwrite=True)
    with pytest.raises(InputError, match="a weight must be a finite number"):
        merge_checkpoints(before, files, out, weights=[1.0, float("nan")], overwrite=True)


@pytest.mark.parametrize("method", ["magmax", "ties"])
def test_the_work_for_a_tensor_does_not_grow_with_their_number(tmp_path, method, monkeypatch):
    asked, shape = [], Weights.shape
    monkeypatch.setattr(Weights, "shape", lambda *args: asked.append(args[1]) or shape(*args))
    each = []
    for number in (20, 200):
        base = {f"layer{i}": torch.full((2,), float(i)) for i in range(number)}
        tasks = [{name: tensor + 1 for name, tensor in base.items()}] * 3
        weights = zip(("base", "t0", "t1", "t2"), (base, *tasks), strict=True)
        start, *files = [write(tmp_path, f"{n}{number}", w, "safetensors") for n, w in weights]
        asked.clear()
        merge_checkpoints(start, files, tmp_path / f"{number}.safetensors", method=method)
        each.append(len(asked) / number)
    assert each[1] <= each[0]
