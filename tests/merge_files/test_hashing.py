"""The hash of a checkpoint is that of its tensors, whatever kind of file holds them."""

import json

import pytest
import torch
from file_cases import METHODS, STORES, random_weights, tuned, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.hashing import BLOCK, ContentHash
from cl_merge.mergers import MERGERS

SIZES = {"small": (7, 5), "large": (40, 30)}


def hashes(path):
    with safe_open(path, framework="pt") as file:
        inputs = json.loads(file.metadata()["cl_merge.inputs"])
    return [entry["xxh3_128"] for entry in inputs]


@pytest.mark.parametrize("store", STORES[:5])
def test_the_same_weights_have_one_hash_in_any_file(tmp_path, base, files, store):
    base_file, (task, *_) = files
    merge_checkpoints(base_file, [task], tmp_path / "1.safetensors")
    again = write(tmp_path, "again", base, store)
    merge_checkpoints(again, [task], tmp_path / "2.safetensors")
    assert hashes(tmp_path / "1.safetensors") == hashes(tmp_path / "2.safetensors")


def test_the_hash_does_not_depend_on_the_method(tmp_path, base, files):
    """Some methods work on whole parameters, which are larger than a block."""
    base_file, tasks = files
    found = []
    for method in METHODS:
        if not MERGERS[method].weighted:
            path = tmp_path / f"{method}.safetensors"
            merge_checkpoints(base_file, tasks[:2], path, method=method, block_size=100)
            found.append(hashes(path))
    assert all(one == found[0] for one in found)


def test_the_hash_of_a_base_does_not_depend_on_what_lies_beside_it(tmp_path, base, files):
    base_file, tasks = files
    vector = write(tmp_path, "vector", tuned(base, 0), "task vector", base)
    outputs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    merge_checkpoints(base_file, tasks, outputs[0])
    merge_checkpoints(base_file, [vector], outputs[1], include=["weight"])
    merge_checkpoints(base_file, [vector, vector], outputs[2], method="ties")
    assert len({hashes(path)[0] for path in outputs}) == 1


CHANGES = {
    "a value": lambda w: {**w, "a": w["a"] + 1},
    "a sign of zero": lambda w: {**w, "a": w["a"].clone().fill_(-0.0)},
    "a shape": lambda w: {**w, "a": w["a"].reshape(3, 2)},
    "an empty shape": lambda w: {**w, "e": torch.zeros(3, 0)},
    "a dtype": lambda w: {**w, "n": w["n"].int()},
    "a name": lambda w: {("c" if n == "b" else n): t for n, t in w.items()},
    "an integer": lambda w: {**w, "n": w["n"] + 1},
    "two names": lambda w: {**w, "a": w["b"], "b": w["a"]},
    "one more empty tensor": lambda w: {**w, "f": torch.zeros(0)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_changes_the_hash(tmp_path, what):
    weights = {
        "a": torch.zeros(2, 3),
        "b": torch.ones(2, 3),
        "n": torch.tensor([1, 0]),
        "e": torch.zeros(0, 3),
    }
    found = []
    for name, content in (("one", weights), ("two", CHANGES[what](weights))):
        path = write(tmp_path, name, content, "safetensors")
        merge_checkpoints(path, [path], tmp_path / f"out-{name}.safetensors")
        found.append(hashes(tmp_path / f"out-{name}.safetensors")[0])
    assert found[0] != found[1]


class InMemory:
    """Tensors where `ContentHash` expects a checkpoint."""

    def __init__(self, tensors):
        self.tensors, self.names = tensors, list(tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype


def hash_of(tensors, block=BLOCK, pieces=lambda flat: [flat]):
    """Hash tensors, each in the pieces that a function cuts it into."""
    content = ContentHash(InMemory(tensors), block)
    for name, tensor in tensors.items():
        start = 0
        for piece in pieces(tensor.reshape(-1)):
            content.update(name, start, piece)
            start += piece.numel()
    return content.hexdigest()


@given(
    size=st.integers(0, 200),
    block=st.integers(1, 50),
    cuts=st.lists(st.integers(0, 200)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_a_stretch_may_come_in_any_chunks(size, block, cuts, dtype):
    tensors = random_weights({"w": (dtype, (size,))}, 0)
    at = sorted(min(cut, size) for cut in cuts)
    assert hash_of(tensors, block, lambda flat: flat.tensor_split(at)) == hash_of(tensors, block)


@given(size=st.integers(1, 200), block=st.integers(1, 50), data=st.data())
def test_blocks_may_come_in_any_order(size, block, data):
    tensors = random_weights({n: (torch.float32, (size,)) for n in "ab"}, 0)
    content = ContentHash(InMemory(tensors), block)
    starts = [(name, start) for name in tensors for start in range(0, size, block)]
    for name, start in data.draw(st.permutations(starts)):
        content.update(name, start, tensors[name][start : start + block])
    assert content.hexdigest() == hash_of(tensors, block)


def test_the_hash_means_the_same_for_ever():
    # A change here makes the hashes in files that were written before worthless.
    tensors = {
        "w": torch.arange(6.0).reshape(2, 3),
        "n": torch.tensor([7]),
        "e": torch.zeros(0, 2, dtype=torch.bfloat16),
    }
    assert hash_of(tensors) == "1c71f58f090d1af108e99ea28f0f8ad2"
    assert BLOCK == 1 << 22
