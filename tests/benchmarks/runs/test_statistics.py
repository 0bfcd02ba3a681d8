"""Runs whose methods have class statistics: what they find, merge, keep and go on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from forked import forked
from killing import digest
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from stopping import stop_at_evaluation

from cl_merge import TaskVector, cli, load_clip, merge
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import collect_results, count_batches, start_run
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.runs.training import run_stream
from cl_merge.class_statistics import Discriminant, StreamStatistics
from cl_merge.mergers import Merger
from cl_merge.task_vectors.scales import Scales, scaled

pytestmark = pytest.mark.slow

SETTINGS = [
    "data=digits",
    "stream.tasks=3",
    "stream.images_per_class=8",
    "stream.test_fraction=0.1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
]
ALL = "compare=[streaming-lda,magmax-aligned,magmax-statistics]"
# Methods with statistics merge as magmax-drift does, and so choose what it chooses.
AUTO = ["method=magmax-drift", "merge.scale=auto", "evaluate=last"]


def run(folder, *words):
    return cli.main(["run", *words, f"out={folder}"])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def files(folder):
    return {
        str(file.relative_to(folder)): digest(file)
        for part in ("statistics", "task_vectors")
        for file in sorted((folder / part).rglob("*.safetensors"))
    } | {"merged.safetensors": digest(folder / "merged.safetensors")}


def same(one, other):
    assert results(one)["methods"] == results(other)["methods"]
    assert files(one) == files(other)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work on one thread, as forked processes do: another number rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all three methods beside MagMax, and one without."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder / "all", *SETTINGS, ALL) == 0
    assert run(folder / "alone", *SETTINGS, "compare=false") == 0
    return folder


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    """The same, with the scale chosen after each task and tests after the last one."""
    folder = tmp_path_factory.mktemp("auto")
    assert run(folder / "all", *SETTINGS, *AUTO, ALL) == 0
    assert run(folder / "alone", *SETTINGS, *AUTO, "compare=false") == 0
    return folder


@pytest.fixture(scope="module")
def test_images():
    """The test images of the runs, transformed, and their labels, in any order."""
    from cl_merge.benchmarks.datasets.loading import load_parts

    stream, _ = load_parts(read_settings(SETTINGS))
    batches = list(stream.test_dataloader())
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def encoded(visual, images):
    with torch.no_grad():
        return torch.nn.functional.normalize(visual.eval()(images), dim=1)


def test_results_say_what_votes_and_share_the_merge(whole):
    found = results(whole / "all")["methods"]
    kinds = {name: method.get("statistics") for name, method in found.items()}
    assert kinds == {
        "zero-shot": None,
        "magmax": None,
        "streaming-lda": "base",
        "magmax-aligned": "aligned",
        "magmax-statistics": "both",
    }
    for name in ("magmax-aligned", "magmax-statistics"):
        assert {key: found[name][key] for key in ("training", "merger", "scale")} == {
            "training": "sequential",
            "merger": "magmax",
            "scale": 0.5,
        }
    assert found["streaming-lda"]["merger"] is found["streaming-lda"]["scale"] is None
    assert all(len(method["seen"]) == 3 for method in found.values())


def test_statistics_change_nothing_in_what_is_trained_and_merged(whole):
    one, other = results(whole / "all")["methods"], results(whole / "alone")["methods"]
    assert one["magmax"] == other["magmax"]
    with_statistics, without = files(whole / "all"), files(whole / "alone")
    assert {n: d for n, d in with_statistics.items() if n in without} == without
    more = {name for name in with_statistics if name not in without}
    assert more == {
        f"statistics/{name}.safetensors"
        for name in ("streaming-lda", "magmax-aligned", "magmax-statistics")
    }


def test_the_statistics_kept_are_those_of_the_pre_trained_features(whole, test_images):
    kept = StreamStatistics.load(whole / "all" / "statistics" / "streaming-lda.safetensors")
    assert (kept.tasks, kept.classes, kept.base.counts.tolist()) == (3, 10, [8] * 10)
    # The discriminant is what classifies, among all classes, once all have been seen.
    images, labels = test_images
    features = encoded(load_clip("glyph").model.visual, images)
    scores = Discriminant.of(kept.gaussians()["base"]).scores(features)
    accuracy = 100 * (scores.argmax(dim=1) == labels).double().mean().item()
    assert results(whole / "all")["methods"]["streaming-lda"]["accuracy"] == pytest.approx(accuracy)


def test_methods_that_differ_in_what_classifies_share_a_merger(tmp_path, monkeypatch):
    updates, update = Counter(), Merger.update

    def counted(self, *arguments):
        updates[type(self).__name__] += 1
        update(self, *arguments)

    monkeypatch.setattr(Merger, "update", counted)
    words = [
        "method=ties-sequential-statistics",
        "compare=[ties-sequential,magmax,magmax-statistics,magmax-aligned]",
        "merge.density=0.5",
        "merge.scale=0.3",
        "merge.beside.magmax.scale=0.7",
        "merge.buffers=base",
        "evaluate=last",
    ]
    assert run(tmp_path / "run", *SETTINGS, *words) == 0
    assert sorted(updates.values()) == [3, 3]
    found = results(tmp_path / "run")["methods"]
    scales = {name: m["scale"] for name, m in found.items()}
    # Methods with statistics choose theirs after each task, but for the run's own, whose is given.
    for name in ("magmax-aligned", "magmax-statistics"):
        assert 0.0 < scales.pop(name) <= 0.5
        assert len(found[name]["chosen_scales"]) == 3
    assert scales == {
        "zero-shot": None,
        "ties-sequential": 0.55,
        "ties-sequential-statistics": 0.3,
        "magmax": 0.7,
    }
    vectors = [
        TaskVector.load(tmp_path / f"run/task_vectors/sequential/task{task}.safetensors")
        for task in range(3)
    ]
    base = {f"visual.{k}": v for k, v in load_clip("glyph").model.visual.state_dict().items()}
    merged = merge(vectors, "ties", density=0.5)
    expected = dict(scaled(base, merged.items(), Scales.read(0.3, 1.0)))
    saved = load_file(tmp_path / "run" / "merged.safetensors")
    assert all(torch.equal(saved[name], expected[name]) for name in vectors[0])


@pytest.mark.parametrize(
    ("method", "weights"), [("magmax-aligned", "aligned"), ("streaming-lda", "base")]
)
def test_the_saved_weights_are_those_that_classify(whole, method, weights, tmp_path, test_images):
    assert run(tmp_path / "run", *SETTINGS, f"method={method}", "compare=false") == 0
    found = results(tmp_path / "run")["methods"][method]
    assert found == results(whole / "all")["methods"][method]
    saved = load_file(tmp_path / "run" / "merged.safetensors")
    visual = load_clip("glyph").model.visual
    base = {f"visual.{name}": value.clone() for name, value in visual.state_dict().items()}
    if weights == "base":
        assert all(torch.equal(saved[name], base[name]) for name in base)
        return
    # The text head alone, as anybody would use the file with open_clip.
    visual.load_state_dict({n.removeprefix("visual."): saved[n] for n in base})
    images, labels = test_images
    predicted = (encoded(visual, images) @ saved["head.weight"].T).argmax(dim=1)
    accuracy = 100 * (predicted == labels).double().mean().item()
    assert found["accuracy"] == pytest.approx(accuracy)
    assert accuracy != pytest.approx(results(whole / "all")["methods"]["magmax"]["accuracy"])


def killed_after_learning(folder, words, number, said):
    """Run in a process that is killed when so many statistics have been learned and written."""
    save, calls = StreamStatistics.save, []

    def last(*arguments):
        save(*arguments)
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        StreamStatistics.save = last
        return run(folder, *words)

    assert forked(work, said) == -signal.SIGKILL


@pytest.mark.parametrize("number", [1, 5])
def test_killed_between_statistics_and_evaluation_it_goes_on_to_the_same_bits(
    whole, tmp_path, number
):
    killed_after_learning(tmp_path / "run", [*SETTINGS, ALL], number, tmp_path / "said")
    assert run(tmp_path / "run") == 0
    same(tmp_path / "run", whole / "all")


def test_killed_before_any_evaluation_it_goes_on_to_the_same_bits(auto, tmp_path):
    killed_after_learning(tmp_path / "run", [*SETTINGS, *AUTO, ALL], 5, tmp_path / "said")
    kept = StreamStatistics.load(tmp_path / "run" / "statistics" / "magmax-aligned.safetensors")
    assert kept.tasks == 2
    assert run(tmp_path / "run") == 0
    same(tmp_path / "run", auto / "all")


def test_statistics_join_a_finished_run(whole, tmp_path):
    shutil.copytree(whole / "alone", tmp_path / "run")
    assert run(tmp_path / "run", ALL) == 0
    same(tmp_path / "run", whole / "all")
    assert run(tmp_path / "run") == 0


def test_statistics_join_a_finished_run_at_the_scales_that_it_chose(auto, tmp_path):
    chosen = results(auto / "alone")["methods"]["magmax-drift"]["chosen_scales"]
    assert len(set(chosen)) > 1, "a run that always chooses the same scale tells nothing"
    shutil.copytree(auto / "alone", tmp_path / "run")
    assert run(tmp_path / "run", ALL) == 0
    same(tmp_path / "run", auto / "all")
    found = results(tmp_path / "run")["methods"]["magmax-statistics"]
    assert (found["chosen_scales"], found["scale"]) == (chosen, chosen[-1])


@pytest.mark.parametrize("settings", [[], AUTO], ids=["every", "last, auto"])
def test_statistics_join_a_run_that_was_stopped(whole, auto, tmp_path, settings, monkeypatch):
    words = [*SETTINGS, *settings]
    with monkeypatch.context() as patch:
        stop_at_evaluation(patch, 4)  # zero-shot is the first
        assert run(tmp_path / "run", *words, "compare=false") == 130
    assert run(tmp_path / "run", ALL) == 0
    same(tmp_path / "run", (auto if settings else whole) / "all")


def test_a_run_from_before_a_method_chose_its_scale_stays_at_the_fixed_one(whole, tmp_path, capsys):
    shutil.copytree(whole / "all", tmp_path / "run")
    file = tmp_path / "run" / "results.json"
    former = json.loads(file.read_text())
    former["methods"]["magmax-aligned"] |= {"scale": 0.5, "chosen_scales": None}
    former["methods"].pop("magmax-drift", None)
    file.write_text(json.dumps(former))
    journal = tmp_path / "run" / "journal.jsonl"
    kept = [line for line in journal.read_text().splitlines() if "magmax-drift" not in line]
    journal.write_text("\n".join(kept) + "\n")
    assert run(tmp_path / "run") == 0
    assert results(tmp_path / "run")["methods"]["magmax-aligned"]["scale"] == 0.5
    # One that had not finished would mix statistics of two scales.
    file.unlink()
    assert run(tmp_path / "run") == 2
    assert "was begun when method 'magmax-aligned' had a fixed" in capsys.readouterr().err


def test_a_method_that_weighs_elements_is_joined_by_its_own_statistics(tmp_path):
    words = [*SETTINGS, "method=fisher", "stream.tasks=2", "merge.importance_samples=4"]
    assert run(tmp_path / "joined", *words, "compare=false") == 0
    assert run(tmp_path / "joined", "compare=[fisher-aligned]") == 0
    assert run(tmp_path / "whole", *words, "compare=[fisher-aligned]") == 0
    same(tmp_path / "joined", tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=zero-shot-statistics"], "'zero-shot' merges nothing; expected a method that"),
        (["compare=[lwf-aligned]"], "'lwf' merges nothing; expected a method that merges"),
        (["method=magmax-statistic"], "unknown method 'magmax-statistic'; did you mean"),
        (["method=magmax-statistics-aligned"], "'magmax-statistics' has class statistics already"),
        (["method=streaming-lda", "merge.scale=auto"], "'streaming-lda' merges nothing"),
        (["method=magmax-aligned", "merge.density=0.3"], "method 'magmax-aligned' has no density"),
        (["method=magmax-aligned", "merge.beside.magmax-drift.scale=1"], "beside the run's own"),
        (["compare=[ties-aligned]", "merge.beside.ties-aligned.density=1"], "mean 'ties-drift'?"),
        (["compare=[ties-aligned]", "merge.beside.ties-drift.density=2"], "ties-drift: density"),
    ],
)
def test_wrong_words_are_one_line_and_nothing_is_written(words, message, tmp_path, capsys):
    assert run(tmp_path / "run", *SETTINGS, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_options_of_what_merged_before_cannot_change_when_statistics_join(whole, capsys):
    words = ["compare=[magmax-statistics,ties-aligned]", "merge.beside.magmax.scale=1"]
    assert run(whole / "all", *words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_statistics_are_named(whole, tmp_path, capsys):
    shutil.copytree(whole / "all", tmp_path / "run")
    file = tmp_path / "run" / "statistics" / "magmax-aligned.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert run(tmp_path / "run", ALL.replace("[", "[average-sequential,")) == 2
    assert f"'{file}' is not a whole safetensors file" in capsys.readouterr().err


def test_two_processes_learn_the_same_statistics_as_one(whole, tmp_path):
    shutil.copytree(whole / "alone", tmp_path / "run")
    # The same trained weights, read and evaluated by two.
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    config.trainer.update({"devices": 2, "strategy": "ddp"})
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    command = [sys.executable, "-m", "cl_merge.cli", "run", ALL, f"out={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")["methods"] == results(whole / "all")["methods"]
    for name in ("streaming-lda", "magmax-aligned", "magmax-statistics"):
        file = f"statistics/{name}.safetensors"
        one, two = (load_file(folder / file) for folder in (whole / "all", tmp_path / "run"))
        assert one.keys() == two.keys()
        # Features of smaller batches may differ in the last bit; nothing else does.
        for key in one:
            torch.testing.assert_close(two[key].double(), one[key].double(), rtol=1e-5, atol=1e-5)


def test_the_bar_ends_at_its_end(tmp_path):
    """What a run counts before it begins is what it does; one that goes on has only the rest."""

    def bar(*words):
        started = start_run(read_settings([*words, f"out={tmp_path / 'run'}"]))
        try:
            with RunProgress(Console(quiet=True), count_batches(started)) as progress:
                run_stream(started, progress)
            started.folder.finish(collect_results(started))
        finally:
            started.folder.release()
        (task,) = progress._progress.tasks
        return task.completed, task.total

    words = [*SETTINGS, "stream.batch_size=16", "compare=[lwf]"]
    bars = [bar(*words), bar(ALL.replace("[", "[lwf,"))]
    # 80 images in tasks of 24, 24 and 32; 144 to test on.
    steps, test = 2 + 2 + 2, 9
    first = test + 2 * (3 * steps + 3 * test)
    more = 3 * 3 * test
    assert bars == [(first, first), (more, more)]
