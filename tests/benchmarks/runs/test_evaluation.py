"""Methods are evaluated from what a run has stored: while it trains, or when they join it later."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from cl_merge import load_clip
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import collect_results, count_batches, start_run
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.runs.training import run_stream
from cl_merge.cli import main
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import copies, floating_buffers, trained_parameters

pytestmark = pytest.mark.slow

SETTINGS = ("data=digits", "stream.tasks=3", "stream.images_per_class=8", "trainer.max_epochs=1")
SMALL = [
    "data=digits",
    "stream.tasks=2",
    "stream.images_per_class=8",
    "stream.test_fraction=0.1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "loggers=false",
]
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


def test_methods_that_join_later_find_what_they_would_have_found(folders):
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


# What is not in the task vectors


class Centre(nn.Module):
    """Takes off a running mean of what it sees in training: a buffer that moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(128))

    def forward(self, features):
        if self.training:
            self.mean.lerp_(features.detach().mean(dim=0), 0.5)
        return features - self.mean


MEAN = "visual.1.mean"


def evaluated(folder, *words, moving=False):
    """The results of a run in a folder, with a buffer in the model that moves if asked for."""
    run = start_run(read_settings([*SMALL, *words, f"out={folder}"]))
    if moving:
        run.model.visual = nn.Sequential(run.model.visual, Centre())
        run.base = copies(trained_parameters(run.model))
        run.buffers = copies(floating_buffers(run.model))
    try:
        with RunProgress(Console(quiet=True), count_batches(run)) as progress:
            run_stream(run, progress)
        run.folder.finish(found := collect_results(run))
    finally:
        run.folder.release()
    return found["methods"]


@pytest.mark.parametrize("choice", ["trained", "base", "average"])
def test_buffers_mean_the_same_for_methods_that_join_later(choice, tmp_path):
    words = [f"merge.buffers={choice}", "method=magmax"]
    others = "compare=[sequential,average-sequential]"
    joined, whole = tmp_path / "joined", tmp_path / "whole"
    evaluated(joined, *words, "compare=false", moving=True)
    later = evaluated(joined, *words, others, moving=True)
    assert later == evaluated(whole, *words, others, moving=True)
    first, last = (
        load_file(whole / f"task_vectors/sequential/unmerged{task}.safetensors")[MEAN]
        for task in (0, 1)
    )
    assert not torch.equal(first, last)
    expected = {"trained": last, "base": torch.zeros(128), "average": (first + last) / 2}[choice]
    torch.testing.assert_close(load_file(whole / "merged.safetensors")[MEAN], expected)


def test_each_training_begins_with_the_buffers_of_the_base(tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    evaluated(both, "method=sequential", "compare=[independent]", moving=True)
    evaluated(alone, "method=independent", "compare=false", moving=True)
    for file in ("unmerged0", "unmerged1"):
        one, other = (
            load_file(folder / f"task_vectors/independent/{file}.safetensors")[MEAN]
            for folder in (both, alone)
        )
        assert torch.equal(one, other)


def test_parameters_left_out_mean_the_same_for_methods_that_join_later(tmp_path):
    words = ["method=magmax", 'merge.exclude=["*.weight"]']
    others = "compare=[sequential,ties-sequential]"
    joined, whole = tmp_path / "joined", tmp_path / "whole"
    evaluated(joined, *words, "compare=false")
    assert evaluated(joined, *words, others) == evaluated(whole, *words, others)
    # They are as they were trained, with merging and without.
    sequential = tmp_path / "sequential"
    found = evaluated(sequential, "method=sequential", 'merge.exclude=["*.weight"]')
    plain = evaluated(tmp_path / "plain", "method=sequential", "compare=false")
    assert found["sequential"] == plain["sequential"]
    saved, merged = (load_file(f / "merged.safetensors") for f in (sequential, whole))
    base = load_clip("glyph").model.visual.state_dict()
    left_out = [n for n in base if n.endswith(".weight")]
    assert all(torch.equal(merged[f"visual.{n}"], saved[f"visual.{n}"]) for n in left_out)
    assert not any(torch.equal(saved[f"visual.{name}"], base[name]) for name in left_out)


def test_a_run_without_moving_buffers_stores_task_vectors_alone(folders):
    _, whole = folders
    files = {file.name for file in (whole / "task_vectors" / "independent").iterdir()}
    assert files == {f"task{task}.safetensors" for task in range(3)}


# Methods that weigh elements


def test_what_weighs_elements_may_be_compared_from_the_first(tmp_path):
    words = ["merge.importance_samples=4"]
    own = evaluated(tmp_path / "own", *words, "method=fisher-sequential", "compare=false")
    compared = evaluated(tmp_path / "run", *words, "method=magmax", "compare=[fisher-sequential]")
    assert compared["fisher-sequential"] == own["fisher-sequential"]


def test_what_weighs_elements_cannot_join_a_run_that_did_not_estimate_how_much(tmp_path):
    evaluated(tmp_path / "run", "method=magmax", "compare=false")
    with pytest.raises(InputError, match=r"importance0.safetensors' is missing: method 'fisher-se"):
        evaluated(tmp_path / "run", "method=magmax", "compare=[fisher-sequential]")
    evaluated(tmp_path / "run")  # the run itself goes on
