"""Methods that weigh elements are given a file of importances with each task."""

import json

import pytest
import torch
from file_cases import grams_of, in_memory, listed, read, same_bits, tuned, write
from safetensors import safe_open

from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import Merger
from cl_merge.task_vectors.task_vector import TaskVector


class Weighted(Merger):
    """The mean, weighted by importance."""

    name = "weighted"
    published_scale = 0.5
    accumulators = {"total": torch.float32, "weight": torch.float32}  # noqa: RUF012
    weighted = True

    def fold(self, state, chunk, info):
        state["total"].addcmul_(chunk, info.importance)
        state["weight"].add_(info.importance)

    def compute(self, state, out, info):
        torch.div(state["total"], state["weight"].clamp(min=1e-9), out=out)


def importance_of(base, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator)
        for name, tensor in base.items()
        if tensor.is_floating_point()
    }


@pytest.mark.parametrize("store", ["safetensors", "shards", "transposed pt"])
@pytest.mark.parametrize("tasks_store", ["safetensors", "task vector"])
def test_they_weigh_as_in_memory(tmp_path, base, tasks, out, store, tasks_store):
    base_file = write(tmp_path, "base", base, "safetensors")
    files = [write(tmp_path, f"t{i}", task, tasks_store, base) for i, task in enumerate(tasks)]
    importances = [importance_of(base, seed) for seed in range(3)]
    beside = [write(tmp_path, f"f{i}", each, store) for i, each in enumerate(importances)]
    merge_checkpoints(
        base_file, files, out / "m.safetensors", method=Weighted(), importances=beside
    )
    merger = Weighted()
    for task, importance in zip(tasks, importances, strict=True):
        merger.update(TaskVector.between(base, task), importance)
    assert same_bits(read(out / "m.safetensors"), merger.merged().apply_to(base, 0.5))


def test_they_are_in_the_provenance(files, base, out, tmp_path):
    base_file, tasks = files
    beside = [write(tmp_path, f"f{i}", importance_of(base, i), "pt") for i in range(3)]
    merge_checkpoints(
        base_file, tasks, out / "m.safetensors", method=Weighted(), importances=beside
    )
    with safe_open(out / "m.safetensors", framework="pt") as file:
        inputs = json.loads(file.metadata()["cl_merge.inputs"])
    assert [entry["role"] for entry in inputs] == ["base", *["task"] * 3, *["importance"] * 3]
    assert inputs[-1]["file"] == "f2.pt"
    assert len({entry["xxh3_128"] for entry in inputs}) == 7


CHANGES = {
    "lacks tensors that are merged: bias": lambda f: {n: t for n, t in f.items() if n != "bias"},
    "has other shapes than the base": lambda f: f | {"bias": torch.ones(3)},
    "the importance of 'bias' is negative, NaN or infinite": lambda f: f | {"bias": -f["bias"]},
    "the importance of 'half' is negative, NaN or infinite": lambda f: f | {"half": f["half"] / 0},
}


@pytest.mark.parametrize("message", CHANGES)
def test_wrong_ones_are_named(files, base, out, tmp_path, message):
    base_file, tasks = files
    wrong = write(tmp_path, "wrong", CHANGES[message](importance_of(base, 0)), "pt")
    with pytest.raises(InputError) as caught:
        merge_checkpoints(
            base_file, tasks[:1], out / "m.safetensors", method=Weighted(), importances=[wrong]
        )
    assert message in str(caught.value)
    assert str(wrong) in str(caught.value)
    assert listed(out) == []


def test_one_for_each_task(files, base, out):
    base_file, tasks = files
    with pytest.raises(InputError) as caught:
        merge_checkpoints(
            base_file, tasks, out / "m.safetensors", method=Weighted(), importances=tasks[:1]
        )
    assert str(caught.value) == (
        "'weighted' needs the importance of each element: 3 files, one for each task, but 1 were "
        "given"
    )


def test_tuned_weights_are_not_changed_by_a_rule_of_weights(files, base, tasks, out):
    """Values handed to a rule lie in the mapped file, or in memory that is used again."""
    base_file, task_files = files
    before = [path.read_bytes() for path in task_files]
    beside = [write(out / "f", str(i), importance_of(tuned(base, i), i), "pt") for i in range(3)]
    merge_checkpoints(
        base_file, task_files, out / "m.safetensors", method=Weighted(), importances=beside
    )
    assert [path.read_bytes() for path in task_files] == before


@pytest.fixture
def grams(tmp_path, base):
    """Files of Gram matrices, which have some that belong to nothing that is merged."""
    each = [{**grams_of(base, seed), "head.weight": torch.eye(3)} for seed in range(3)]
    return [write(tmp_path, f"g{seed}", gram, "safetensors") for seed, gram in enumerate(each)]


def test_gram_matrices_weigh_as_in_memory(files, base, tasks, grams, out):
    base_file, task_files = files
    merge_checkpoints(
        base_file, task_files, out / "m.safetensors", method="regmean", importances=grams
    )
    each = [grams_of(base, seed) for seed in range(3)]
    assert same_bits(
        read(out / "m.safetensors"), in_memory(base, tasks, "regmean", importances=each)
    )


def refusal(files, beside, out):
    with pytest.raises(InputError) as caught:
        merge_checkpoints(*files, out / "m.safetensors", method="regmean", importances=beside)
    assert listed(out) == []
    return str(caught.value)


def test_wrong_gram_matrices_are_named(files, base, grams, out, tmp_path):
    def other(**tensors):
        return [*grams[:2], write(tmp_path, "other", {**grams_of(base, 0), **tensors}, "pt")]

    assert "3 files, one for each task, but 2 were given" in refusal(files, grams[:2], out)
    message = refusal(files, other(wide=torch.eye(99)), out)
    assert "has no Gram matrices of inputs: wide (99, 99) for a weight of shape (3, 100)" in message
    message = refusal(files, other(wide=torch.eye(100).roll(1, 0)), out)
    assert "the importance of 'wide' is no Gram matrix: not symmetric" in message
    message = refusal(files, other(wide=torch.eye(100) * float("nan")), out)
    assert "the importance of 'wide' is no Gram matrix: not symmetric" in message
    few = write(tmp_path, "few", {"wide": torch.eye(100)}, "pt")
    assert "of other weights than the tasks before; missing: double, " in refusal(
        files, [*grams[:2], few], out
    )
    unknown = write(tmp_path, "unknown", {"module.wide": torch.eye(100)}, "safetensors")
    assert "has no Gram matrix of what is merged, but has " in refusal(files, [unknown] * 3, out)
