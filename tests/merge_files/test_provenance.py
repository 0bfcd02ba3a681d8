"""A merged file says how it was made, in the same words every time."""

import json
import logging

import pytest
import torch
from file_cases import write
from safetensors import safe_open

from cl_merge import __version__
from cl_merge.merge_files import merge_checkpoints


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What was warned of, since the last look."""
    monkeypatch.setattr(logging.getLogger("cl_merge"), "propagate", True)
    caplog.set_level(logging.WARNING, "cl_merge")

    def look():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return look


def test_the_output_tells_how_it_was_made(files, out):
    base, (one, two, _) = files
    done = merge_checkpoints(
        base,
        [one, two],
        out / "m.safetensors",
        method="ties",
        density=0.3,
        scale={"w*": 0.25},
        include=["w*", "bias"],
        exclude=["wide"],
    )
    found = metadata(out / "m.safetensors")
    inputs = json.loads(found.pop("cl_merge.inputs"))
    assert found == {
        "format": "pt",
        "cl_merge.version": __version__,
        "cl_merge.method": "ties",
        "cl_merge.options": '{"density": 0.3, "per_parameter": false, "sign": "value", "combine": "mean", "task_weights": null}',
        "cl_merge.scale": '{"w*": 0.25, "*": 0.55}',
        "cl_merge.include": '["w*", "bias"]',
        "cl_merge.exclude": '["wide"]',
        "cl_merge.buffers": "trained",
        "cl_merge.weights": "[1.0, 1.0]",
        "cl_merge.strip_prefix": "",
    }
    assert {**found, "cl_merge.inputs": json.dumps(inputs)} == done.provenance
    assert [(entry["file"], entry["kind"], entry["role"]) for entry in inputs] == [
        ("base.safetensors", "safetensors", "base"),
        ("task0.safetensors", "safetensors", "task"),
        ("task1.safetensors", "safetensors", "task"),
    ]
    for entry in inputs:
        assert len(entry["xxh3_128"]) == 32
        assert int(entry["xxh3_128"], 16) > 0


def test_the_same_inputs_give_the_same_bytes(files, out, base, tmp_path):
    first, second = out / "1.safetensors", out / "2.safetensors"
    merge_checkpoints(*files, first, method="random-mix")
    merge_checkpoints(*files, second, method="random-mix")
    assert first.read_bytes() == second.read_bytes()
    elsewhere = tmp_path / "elsewhere/base.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(files[0].read_bytes())
    merge_checkpoints(elsewhere, files[1], second, method="random-mix", overwrite=True)
    assert first.read_bytes() == second.read_bytes()


def test_what_the_base_says_of_itself_is_kept(files, out):
    base, tasks = files
    merge_checkpoints(base, tasks, out / "1.safetensors", method="ties")
    merge_checkpoints(out / "1.safetensors", tasks, out / "2.safetensors")
    found = metadata(out / "2.safetensors")
    assert found["cl_merge.method"] == "magmax"
    assert found["cl_merge.options"] == "{}"
    assert '"1.safetensors"' in found["cl_merge.inputs"]


def test_a_folder_is_named_wherever_the_command_runs(tmp_path, base, out, monkeypatch):
    folder = write(tmp_path, "model", base, "shards")
    monkeypatch.chdir(folder)
    merge_checkpoints(".", [folder], out / "m.safetensors")
    inputs = json.loads(metadata(out / "m.safetensors")["cl_merge.inputs"])
    assert [entry["file"] for entry in inputs] == ["model", "model"]


def test_an_alias_of_a_method_is_kept(files, out):
    merge_checkpoints(*files, out / "m.safetensors", method="max-abs")
    assert metadata(out / "m.safetensors")["cl_merge.method"] == "max-abs"


def test_every_shard_tells_it(files, out):
    merge_checkpoints(*files, out / "merged", shard_bytes=1000)
    shards = list((out / "merged").glob("*.safetensors"))
    assert len(shards) > 1
    assert len({json.dumps(metadata(shard), sort_keys=True) for shard in shards}) == 1


def test_usual_inputs_give_no_warning(files, out, warnings):
    merge_checkpoints(*files, out / "m.safetensors", method="ties")
    assert warnings() == []


def test_a_task_that_is_the_base_is_told(files, out, base, warnings):
    base_file, tasks = files
    same = write(out / "beside", "same", base, "pt")
    merge_checkpoints(base_file, [tasks[0], same], out / "m.safetensors")
    assert warnings() == [f"'{same}' holds the same as '{base_file}'"]


def test_two_tasks_that_are_the_same_are_told(files, out, tasks, warnings):
    base, task_files = files
    same = write(out / "beside", "same", tasks[1], "shards")
    merge_checkpoints(base, [*task_files, same], out / "m.safetensors")
    assert warnings() == [f"'{same}' holds the same as '{task_files[1]}'"]
    merge_checkpoints(base, [task_files[0]] * 2, out / "n.safetensors")
    assert warnings() == [f"'{task_files[0]}' is given more than once"]


def test_tensors_that_are_not_merged_but_differ_are_told(files, out, base, tasks, warnings):
    base_file, _ = files
    counted = {**tasks[0], "steps": base["steps"] + 1, "bias": base["bias"] + 1}
    other = write(out / "beside", "other", counted, "safetensors")
    merge_checkpoints(base_file, [other], out / "m.safetensors", include=["weight"])
    changed = sorted(n for n in base if n != "weight" and not torch.equal(counted[n], base[n]))
    assert {"steps", "bias"} < set(changed)
    (message,) = warnings()
    assert message == (
        "tensors that are not merged differ between the inputs; the base's were taken: "
        f"{', '.join(changed[:4])} and {len(changed) - 4} more"
    )
