"""A prefix is taken off the names of tasks that the base has not, and off nothing else."""

import json

import pytest
import torch
from file_cases import listed, read, write
from safetensors import safe_open

from cl_merge import cli
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.inspection import inspect_checkpoints
from cl_merge.task_vectors.task_vector import TaskVector

# As a language model has them, of which a part begins with the prefix itself.
BASE = {"model.layers.0": torch.zeros(3, 2), "lm_head": torch.zeros(4), "steps": torch.tensor(0)}


def moved(prefix, by, base=BASE):
    return {prefix + n: t + by for n, t in base.items()}


def paths(folder, *every):
    return [write(folder, f"w{i}", w, "safetensors") for i, w in enumerate(every)]


def test_wrapped_tasks_and_plain_ones_merge_into_a_base_that_has_the_prefix_too(tmp_path):
    base, wrapped, bare = paths(tmp_path, BASE, moved("model.", 1), moved("", 2))
    lightning = write(tmp_path, "l", moved("model.", 6), "ckpt")
    out = tmp_path / "o.safetensors"
    tasks = [wrapped, bare, lightning]
    merge_checkpoints(base, tasks, out, method="average", strip_prefix="model.")
    found = read(out)
    assert found.keys() == BASE.keys()
    assert found["model.layers.0"].unique().tolist() == [3]
    assert found["lm_head"].unique().tolist() == [3]
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["cl_merge.strip_prefix"] == "model."
        assert len(json.loads(file.metadata()["cl_merge.inputs"])) == 4
    assert not inspect_checkpoints(tasks, base).fine
    assert inspect_checkpoints(tasks, base, strip_prefix="model.").fine


def test_task_vectors_and_importances_too(tmp_path):
    plain = {n: t for n, t in BASE.items() if t.is_floating_point()}
    vectors = [tmp_path / f"v{i}.safetensors" for i in range(2)]
    for i, path in enumerate(vectors):
        TaskVector(moved("net.", 1.0 + 2 * i, plain)).save(path)
    base, one, two = paths(tmp_path, plain, moved("net.", 1, plain), moved("net.", 3, plain))
    out = tmp_path / "o.safetensors"
    beside = [one, two]
    options = {"method": "fisher", "importances": beside, "strip_prefix": "net."}
    merge_checkpoints(base, vectors, out, **options)
    assert read(out)["lm_head"].unique().tolist() == [2.5]


def test_without_a_base_all_names_lose_it(tmp_path):
    one, two = paths(tmp_path, moved("net.", 1), moved("", 3))
    out = tmp_path / "o.safetensors"
    merge_checkpoints(None, [one, two], out, method="average", strip_prefix="net.")
    assert read(out)["lm_head"].unique().tolist() == [2]


def test_the_dot_of_a_prefix_may_be_left_out(tmp_path, out):
    plain = BASE | {"modelling": torch.zeros(2)}
    kept = {"modelling": torch.ones(2)}
    base, task = paths(tmp_path, plain, moved("model.", 1) | kept)
    for prefix in ("model.", "model"):
        merge_checkpoints(base, [task], out / f"{prefix}.safetensors", strip_prefix=prefix)
    with_dot, without = (read(out / f"{prefix}.safetensors") for prefix in ("model.", "model"))
    assert all(torch.equal(with_dot[name], without[name]) for name in plain)
    assert bool(without["modelling"].all())


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_a_prefix_that_no_name_has(tmp_path, out, prefix, capsys):
    base, task = paths(tmp_path, BASE, moved("model.", 1))
    words = [str(base), str(task), "--strip-prefix", prefix]
    assert cli.main(["merge", *words, "-o", str(out / "o")]) == 2
    assert f"strip_prefix '{prefix}': no name in '{task}' begins with it" in capsys.readouterr().err
    assert cli.main(["inspect", str(task), "--strip-prefix", prefix]) == 2
    assert f"strip_prefix '{prefix}': no name in" in capsys.readouterr().err
    assert listed(out) == []


def test_two_tensors_of_one_name(tmp_path, out):
    base, task = paths(tmp_path, BASE, moved("model.", 1) | moved("", 2))
    with pytest.raises(InputError) as caught:
        merge_checkpoints(base, [task], out / "o", strip_prefix="model.")
    message, names = str(caught.value).rsplit(": ", 1)
    assert message == f"'{task}' has two tensors of one name without 'model.'"
    assert set(names.split(", ")) == {"model.lm_head", "model.model.layers.0", "model.steps"}
    assert listed(out) == []
