"""Methods that join a run when its training is done, from what it has stored."""

import json

import pytest

from cl_merge.cli import main

SETTINGS = ("data=digits", "stream.tasks=3", "stream.images_per_class=8", "trainer.max_epochs=1")
OTHERS = "compare=[independent,ties,average]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run that two methods joined, and one that had them from the first."""
    joined, whole = (tmp_path_factory.mktemp(name) / "run" for name in ("joined", "whole"))
    assert main(["run", *SETTINGS, "method=max-abs", "compare=[independent]", f"out={joined}"]) == 0
    before = (joined / "merged.safetensors").read_bytes()
    assert main(["run", f"out={joined}", OTHERS]) == 0
    assert (joined / "merged.safetensors").read_bytes() == before
    assert main(["run", *SETTINGS, "method=max-abs", OTHERS, f"out={whole}"]) == 0
    return joined, whole


def test_latecomers_find_what_they_would_have_found(folders):
    joined, whole = (json.loads((f / "results.json").read_text()) for f in folders)
    assert joined["methods"] == whole["methods"]
    assert list(joined["methods"]) == list(whole["methods"])


def test_what_was_trained_is_not_trained_again(folders):
    joined, _ = folders
    records = [json.loads(line) for line in (joined / "journal.jsonl").read_text().splitlines()]
    late = [r["method"] for r in records if r.get("session") == 2 and "method" in r]
    assert sorted(late) == ["average"] * 3 + ["ties"] * 3
    log = [json.loads(line) for line in (joined / "logs/journal.jsonl").read_text().splitlines()]
    assert [r["task"] for r in log if "steps" in r] == [0, 1, 2]


def test_the_folder_goes_on_with_all_of_them(folders, capsys):
    joined, _ = folders
    assert main(["run", f"out={joined}"]) == 0
    assert "nothing is left to do" in " ".join(capsys.readouterr().out.split())
    assert main(["run", f"out={joined}", OTHERS]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare=[ties]"], "holds a run with compare=['independent', 'ties', 'average']"),
        (["merge.beside.ties.density=0.3"], "holds a run with merge.beside.ties.density=None"),
        (["method=ties"], "holds a run with"),
    ],
)
def test_what_the_run_has_already_cannot_change(folders, words, message, capsys):
    joined, _ = folders
    assert main(["run", f"out={joined}", *words]) == 2
    assert message in capsys.readouterr().err
