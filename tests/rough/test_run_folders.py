"""Whatever has become of the folder of a run: the same figures, or one clear error; never another."""

import json
import os
import random

import pytest
from damage import SEEDS, complaint, damaged_bytes, edited
from PIL import Image

from cl_merge import cli, load
from cl_merge.benchmarks.reports.summary import summary_of_run
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.runs.run_folder import RunFolder
from cl_merge.benchmarks.runs.settings import read_settings

pytestmark = pytest.mark.slow


def readers(folder, name):
    """All that reads a file of a run."""
    yield lambda: summary_of_run(folder)
    if name == "config.yaml":
        yield lambda: read_settings([f"out={folder}"])
        return
    yield lambda: read_results(folder)
    yield lambda: RunFolder(folder).rows("magmax")
    yield lambda: RunFolder(folder).chosen_scales("magmax")
    yield lambda: RunFolder(folder).finished_training("sequential")


def check(folder, name):
    for read in readers(folder, name):
        assert "\n" not in complaint(read)


@pytest.mark.parametrize("name", ["results.json", "journal.jsonl", "config.yaml"])
def test_damaged_files_are_an_error_or_read_as_they_were(copied, name):
    file = copied / name
    content = file.read_bytes()
    for seed in SEEDS:
        file.write_bytes(damaged_bytes(content, random.Random(seed)))
        check(copied, name)


def test_edited_results_are_an_error_or_change_nothing_that_is_used(copied):
    file = copied / "results.json"
    results = json.loads(file.read_text())
    refused = 0
    for seed in SEEDS:
        file.write_text(json.dumps(edited(results, random.Random(seed))))
        check(copied, file.name)
        said = complaint(lambda: read_results(copied))
        assert said.startswith(f"'{file}' is damaged: ") or not said
        refused += bool(said)
    assert refused > len(SEEDS) / 2


def test_edited_journals_are_an_error_or_read(copied):
    file = copied / "journal.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for seed in SEEDS:
        changed = edited(records, random.Random(seed))
        file.write_text("".join(json.dumps(record) + "\n" for record in changed))
        check(copied, file.name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda r: r["methods"]["magmax"].update(accuracy=None),
            "Expected `float`, got `null` - at `$.methods[...].accuracy`",
        ),
        (lambda r: r["tasks"].pop(), "methods.zero-shot.matrix is not of 1 tasks"),
        (
            lambda r: r["tasks"][0].update(classes="ab"),
            "Expected `array`, got `str` - at `$.tasks[0].classes`",
        ),
        (lambda r: r.update(seed=True), "Expected `int`, got `bool` - at `$.seed`"),
        (lambda r: r["methods"].pop("zero-shot"), "methods.zero-shot is missing"),
        (lambda r: r["total"].update(seconds=1e400), "JSON is malformed: invalid character"),
    ],
)
def test_every_command_names_the_entry(copied, change, said, capsys):
    results = json.loads((copied / "results.json").read_text())
    change(results)
    image = copied.parent / "image.png"
    Image.new("L", (8, 8)).save(image)
    (copied / "results.json").write_text(json.dumps(results))
    suite = copied.parents[2]
    (suite / "suite.yaml").write_text(
        "settings: [{data: digits, tasks: 2}]\nmethods: [magmax]\nabout: one\n"
    )
    for words in (
        ["run", f"out={copied}"],
        ["predict", str(copied), str(image)],
        ["export", str(copied), "--format", "torch", "-o", "exported"],
        ["report", str(copied), "--no-figures"],
        ["report", str(suite), "--no-figures"],
    ):
        assert cli.main(words) == 2, words
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert f"'{copied / 'results.json'}' is damaged: {said}" in shown


@pytest.mark.parametrize("name", ["results.json", "journal.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "nested"])
def test_something_else_in_the_place_of_a_file_is_an_error_and_no_wait(copied, name, kind):
    file = copied / name
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file)
    else:
        file.write_text("[" * 100_000 + "]" * 100_000 + "\n{}\n")
    check(copied, name)


def test_damaged_weights_load_or_are_an_error(copied):
    file = copied / "merged.safetensors"
    content = file.read_bytes()
    for seed in range(15):
        file.write_bytes(damaged_bytes(content, random.Random(seed)))
        said = complaint(lambda: load(copied))
        assert str(file) in said or not said
