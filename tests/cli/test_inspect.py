"""What ``cl-merge inspect`` prints, and its exit code."""

import json
import math

import pytest
import torch
from file_cases import random_weights, tuned, write
from safetensors.torch import save_file

from cl_merge import cli
from cl_merge.merge_files.inspection import inspect_checkpoints
from cl_merge.task_vectors.task_vector import TaskVector

LAYOUT = {
    "visual.conv1.weight": (torch.float32, (8, 3, 4)),
    "visual.[ln].bias": (torch.float32, (16,)),
    "steps": (torch.int64, ()),
}


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def base():
    return random_weights(LAYOUT, 0)


@pytest.fixture
def files(tmp_path, base, monkeypatch):
    """The base and three tasks, by names relative to where the command runs."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "base", base, "safetensors")
    for seed in range(3):
        write(tmp_path, f"task{seed}", tuned(base, seed), "safetensors")
    return ["task0.safetensors", "task1.safetensors", "task2.safetensors"]


@pytest.fixture
def inspect(capsys):
    """Run the command; returns its exit code and what it printed."""

    def run(*words):
        code = cli.main(["inspect", *map(str, words)])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return run


def test_files_are_compared_in_what_fits_a_terminal(inspect, files):
    code, printed = inspect(*files, "--base", "base.safetensors")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    found = inspect_checkpoints(files, "base.safetensors")
    lines = [line.split() for line in printed.splitlines()]
    for number, file in enumerate(found.files):
        described = "safetensors, 3 tensors, 112 values, float32, int64"
        assert f"{number}  task{number}.safetensors  {described}" in printed
        assert [
            str(number),
            f"{file.norm:.4g}",
            f"{100 * file.relative:.1f}",
            "%",
            f"{100 * file.zeros:.1f}",
            "%",
            f"{file.largest:.3g}",
        ] in lines
    assert ["2", f"{found.cosines[2][0]:.2f}", f"{found.cosines[2][1]:.2f}"] in lines
    assert f"{100 * found.conflicts:.1f} % of all values that a task moves" in printed
    assert f"{100 * found.top_conflicts:.1f} % of the largest 20 % of each task" in printed
    assert "task vectors over base.safetensors" in printed
    assert "cannot be merged" not in printed


def test_files_that_a_pattern_names_are_shown_by_number(files, tmp_path, capsys):
    (tmp_path / files[1]).rename(tmp_path / "task10.safetensors")
    assert cli.main(["inspect", files[0], "task10.safetensors", files[2]]) == 0
    printed = capsys.readouterr()
    assert "1  task2.safetensors" in printed.out
    assert "in the order of their numbers" in printed.err


def test_many_tasks_fit_too(inspect, files):
    code, printed = inspect(*files * 5, "--base", "base.safetensors")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert "cosine between tasks: " in printed
    assert "to 1.00 (" in printed


def test_a_task_of_zeros_is_left_out_of_the_cosines(inspect, files):
    zeros = ["base.safetensors"]
    code, printed = inspect(*files, *zeros, *files * 3, "--base", "base.safetensors")
    assert code == 0
    assert "12 pairs with a task of zeros, which has no cosine" in printed
    assert "to 1.00 (" in printed
    assert "nan" not in printed
    assert "on average" not in inspect(*zeros * 12, "--base", "base.safetensors")[1]


def test_layers_are_shown_if_asked_for(inspect, files):
    assert "visual.conv1.weight" not in inspect(*files)[1]
    _, printed = inspect(*files, "--base", "base.safetensors", "--layers")
    norms = [
        f"{file.layers['visual.[ln].bias']:.3g}"
        for file in inspect_checkpoints(files, "base.safetensors").files
    ]
    assert ["visual.[ln].bias", *norms] in [line.split() for line in printed.splitlines()]


def test_without_a_base_weights_are_looked_at_as_they_are(inspect, files):
    code, printed = inspect(*files)
    assert code == 0
    assert "weights as they are; --base shows what training changed" in printed
    assert "sign conflicts" not in printed
    assert "of base's norm" not in printed


def test_one_file_has_nothing_to_agree_with(inspect, files):
    code, printed = inspect(files[0], "--base", "base.safetensors")
    assert code == 0
    assert "cosine" not in printed
    assert "sign conflicts" not in printed


def test_task_vectors_need_no_base(inspect, files, base, tmp_path):
    for seed in range(2):
        write(tmp_path, f"v{seed}", tuned(base, seed), "task vector", base)
    code, printed = inspect("v0.safetensors", "v1.safetensors")
    assert code == 0
    assert "0  v0.safetensors  task vector, 2 tensors, 112 values, float32" in printed
    assert "sign conflicts" in printed
    found = inspect_checkpoints(files[:2], "base.safetensors")
    assert f"{100 * found.conflicts:.1f} % of all values" in printed


def test_what_keeps_files_from_being_merged_is_named(inspect, files, base):
    broken = {**tuned(base, 5), "new": torch.ones(1)}
    broken["visual.conv1.weight"] = broken["visual.conv1.weight"].clone()
    broken["visual.conv1.weight"][0, 0, 0] = math.nan
    broken["visual.[ln].bias"] = torch.ones(4)
    del broken["steps"]
    torch.save(broken, "broken.pt")
    code, printed = inspect(files[0], "broken.pt", "--base", "base.safetensors")
    assert code == 1
    assert "cannot be merged as they are" in printed
    assert "only the 1 tensor that all have alike" in printed
    problems = [line for line in printed.splitlines() if line.startswith("broken.pt: ")]
    assert problems == [
        "broken.pt: holds NaN or infinity: visual.conv1.weight",
        "broken.pt: has tensors that the base lacks: new",
        "broken.pt: differs from the base: visual.[ln].bias (4,) instead of (16,)",
    ]
    code, printed = inspect("broken.pt", files[0])
    assert code == 1
    assert "task0.safetensors: lacks tensors of 'broken.pt': new" in printed
    only = ["--base", "base.safetensors", "--include", "visual.conv1.*"]
    assert inspect(files[0], *only)[0] == 0
    assert inspect(files[0], "broken.pt", *only)[0] == 1


def test_nan_in_the_base_is_named(inspect, files, base):
    base["visual.[ln].bias"][3] = math.inf
    save_file(base, "base.safetensors")
    code, printed = inspect(*files, "--base", "base.safetensors")
    assert code == 1
    assert "\nbase.safetensors: holds NaN or infinity: visual.[ln].bias\n" in printed
    assert printed.count("holds NaN") == 1


def test_task_vectors_of_different_parts_are_told(inspect, files):
    TaskVector({"visual.[ln].bias": torch.ones(16)}).save("part.safetensors")
    code, printed = inspect(files[0], "part.safetensors", "--base", "base.safetensors")
    assert code == 1
    assert (
        "part.safetensors: changes other tensors than 'task0.safetensors': visual.conv1.weight"
        in printed
    )


def test_nothing_in_common_has_no_figures(inspect, files):
    torch.save({"else": torch.ones(2)}, "other.pt")
    code, printed = inspect("other.pt", "--base", "base.safetensors")
    assert code == 1
    assert "only the 0 tensors that all have alike" in printed
    assert "nan" not in printed


def test_names_with_brackets_are_shown_as_they_are(inspect, files, tmp_path):
    (tmp_path / "[red]").mkdir()
    (tmp_path / "[red]/[bold].safetensors").write_bytes((tmp_path / files[0]).read_bytes())
    _, printed = inspect("[red]/[bold].safetensors", "--base", "base.safetensors")
    assert "0  [red]/[bold].safetensors" in printed


def test_json_holds_everything(inspect, files):
    code, printed = inspect(*files, "--base", "base.safetensors", "--json", "--density", "0.5")
    assert code == 0
    read = json.loads(printed)
    found = inspect_checkpoints(files, "base.safetensors", density=0.5)
    assert read["density"] == 0.5
    assert read["conflicts"] == found.conflicts
    assert read["top_conflicts"] == found.top_conflicts
    assert read["cosines"] == found.cosines
    assert read["base"] == "base.safetensors"
    assert read["fine"] is True
    for number, file in enumerate(read["files"]):
        assert file["path"] == files[number]
        assert file["norm"] == found.files[number].norm
        assert file["layers"] == found.files[number].layers


def test_json_has_null_where_there_is_no_number(inspect, files):
    torch.save({"else": torch.ones(2)}, "other.pt")
    code, printed = inspect("other.pt", "--base", "base.safetensors", "--json")
    assert code == 1
    read = json.loads(printed, parse_constant=pytest.fail)
    assert read["conflicts"] is None
    assert read["files"][0]["norm"] is None
    assert read["files"][0]["extra"] == ["else"]
    assert read["fine"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no.pt"], "there is no file or folder 'no.pt'; check the path"),
        (["base.safetensors", "--density", "0"], "the density must be above 0 and at most 1, not"),
    ],
)
def test_wrong_input_is_one_line(files, capsys, words, message):
    assert cli.main(["inspect", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"cl-merge: {message}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
