"""Files that a pattern of the shell names are taken by number."""

import pytest

from cl_merge.cli.file_order import by_number


@pytest.mark.parametrize(
    "names",
    [
        [f"task{i}.safetensors" for i in (0, 1, 10, 11, 2)],
        [f"run{i}/task{j}" for i in (1, 10, 2) for j in (10, 9)],
        ["t10_x.pt", "t1_x.pt", "t2_x.pt"],  # as bytes
        ["t1_x.pt", "t10_x.pt", "t2_x.pt"],  # as a language sorts them
    ],
)
def test_the_order_of_the_shell_becomes_that_of_numbers(names, tmp_path, monkeypatch, capsys):
    made(names, tmp_path, monkeypatch)
    found = by_number(names)
    assert found == sorted(names, key=lambda name: [int(c) for c in digits(name).split()])
    assert capsys.readouterr().err.startswith(
        "cl-merge: files are taken in the order of their numbers, not of the shell: " + found[0]
    )


@pytest.mark.parametrize(
    "names",
    [
        ["task2.pt", "task0.pt", "task10.pt"],
        ["a10.pt", "b2.pt"],
        ["t9.pt", "t10.pt"],
        ["cars.pt", "birds.pt"],
        ["one.pt"],
        [],
    ],
)
def test_any_other_order_stays(names, tmp_path, monkeypatch, capsys):
    made(names, tmp_path, monkeypatch)
    assert by_number(names) == names
    assert capsys.readouterr().err == ""


def test_models_of_the_hub_are_named_one_by_one():
    assert by_number(["org/v10", "org/v9"]) == ["org/v10", "org/v9"]


def made(names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in names:
        (folder / name).mkdir(parents=True)


def digits(name):
    return "".join(c if c.isdigit() else " " for c in name)
