"""All figures of a suite of real runs, small ones."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from case_suite import make_suite

from cl_merge import cli
from cl_merge.analysis import keep
from cl_merge.benchmarks.reports.figures import KINDS, figures_of
from cl_merge.benchmarks.reports.figures.evaluated import SHARES
from cl_merge.benchmarks.reports.figures.suite_runs import find_settings
from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.errors import InputError
from cl_merge.mergers import merge

pytestmark = pytest.mark.slow

SETTINGS = [
    "stream.tasks=2",
    "stream.images_per_class=8",
    "stream.test_fraction=0.1",
    "trainer.max_epochs=2",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=0",
    "trainer.accelerator=cpu",
]
METHODS = {"sequential": ("magmax", "sequential"), "independent": ("ties", "independent")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    suite = tmp_path_factory.mktemp("suite")
    for training, (method, other) in METHODS.items():
        out = suite / "digits-2/seed0" / training
        words = [*SETTINGS, f"method={method}", f"compare=[{other}]", f"out={out}"]
        assert cli.main(["run", *words]) == 0
    return suite


@pytest.fixture(scope="module")
def drawn(trained):
    told = []
    figures = figures_of(trained, progress=lambda *words: told.append(words))
    return figures, told


def contents(suite: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((suite / "figures").iterdir())}


def measure(suite: Path, kind: str, training: str):
    file = suite / "analysis/digits-2" / f"{kind}-seed0.json"
    return json.loads(file.read_text())["trainings"][training]["found"]


def test_every_kind_is_drawn_as_svg_and_png_with_words_and_numbers(trained, drawn):
    figures, _ = drawn
    assert [figure.kind for figure in figures] == [k.name for k in KINDS if not k.compares]
    for figure in figures:
        file = trained / "figures" / f"digits-2-{figure.kind}.svg"
        assert file.read_text() == figure.svg
        assert file.with_suffix(".png").stat().st_size > 1000
        assert figure.title
        assert figure.caption.endswith("One seed.")
        assert all(len(row) == len(figure.columns) for row in figure.rows)


def test_progress_names_each_measurement_and_ends_when_all_are_done(drawn):
    _, told = drawn
    done = [words[1] for words in told]
    assert done == list(range(len(told)))
    assert {words[2] for words in told} == {len(told) - 1}
    assert told[0][0] == "pruning of digits-2, seed 0, sequential"


@pytest.mark.parametrize("training", METHODS)
def test_whole_task_vectors_are_as_good_as_the_run_found_them(trained, drawn, training):
    results = json.loads((trained / "digits-2/seed0" / training / "results.json").read_text())
    matrix = results["methods"][METHODS[training][1]]["matrix_task_aware"]
    found = measure(trained, "pruning", training)
    assert found["whole"] == pytest.approx([matrix[task][task] for task in range(2)])


@pytest.fixture(scope="module")
def evaluated(trained):
    (setting,) = find_settings(trained)
    run = setting.runs[0]
    return run, RunEvaluator.of(run.folder)


def test_merging_and_evaluating_again_gives_what_the_run_found(evaluated):
    run, evaluator = evaluated
    methods = run.results["methods"]
    assert evaluator.accuracy({}.items(), 1.0) == pytest.approx(methods["zero-shot"]["accuracy"])
    merged = merge(run.vectors(), "magmax")
    assert evaluator.accuracy(merged.items(), 0.5) == pytest.approx(methods["magmax"]["accuracy"])


def test_a_tasks_images_count_as_they_do_among_all(trained, drawn, evaluated):
    run, evaluator = evaluated
    vector = keep(next(run.vectors()), SHARES[3], "lowest")
    whole, own = (
        evaluator.counts(vector.items(), 1.0),
        evaluator.counts(vector.items(), 1.0, task=1),
    )
    assert own[:, 1].tolist() == whole[:, 1].tolist()
    assert own[:, 0].tolist() == [0, 0, 0]


def test_images_of_another_data_set_are_refused(evaluated):
    run, evaluator = evaluated
    evaluator.check_same(run.results)
    other = json.loads(json.dumps(run.results))
    other["tasks"][1]["test_images"] += 1
    with pytest.raises(InputError, match=r"not the one that the run was tested on: .* in tasks 1"):
        evaluator.check_same(other)


def test_what_was_measured_is_not_measured_again_and_draws_the_same_bytes(trained, drawn, tmp_path):
    figures, _ = drawn
    suite = shutil.copytree(trained, tmp_path / "suite")
    for config in suite.glob("*/*/*/config.yaml"):
        config.unlink()  # without it no model can be loaded
    assert figures_of(suite) == figures
    assert contents(suite) == contents(trained)


def test_without_evaluation_the_other_figures_are_made(tmp_path, caplog):
    make_suite(tmp_path)
    kinds = [figure.kind for figure in figures_of(tmp_path, evaluate=False)]
    assert kinds == ["curve", "matrix", "sign-conflicts", "consistency", "origins"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_changed_results_are_measured_anew(tmp_path):
    make_suite(tmp_path, seeds=1)
    figures_of(tmp_path, evaluate=False)
    file = tmp_path / "analysis/birds-3/origins-seed0.json"
    before = json.loads(file.read_text())
    run = tmp_path / "birds-3/seed0/independent/results.json"
    run.write_text(run.read_text() + "\n")
    figures_of(tmp_path, evaluate=False)
    after = json.loads(file.read_text())
    for training in METHODS:
        same = before["trainings"][training] == after["trainings"][training]
        assert same == (training == "sequential")


def test_another_option_of_a_kind_makes_its_measures_stale(tmp_path):
    make_suite(tmp_path, seeds=1)
    first = figures_of(tmp_path, evaluate=False)
    file = tmp_path / "analysis/birds-3/consistency-seed0.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({"options": {"bins": 3}, "trainings": {"sequential": {}}}))
    assert figures_of(tmp_path, evaluate=False) == first
    assert json.loads(file.read_text()) == before


def test_a_run_without_its_task_vectors_is_left_out_and_named(tmp_path, caplog):
    make_suite(tmp_path, seeds=1)
    shutil.rmtree(tmp_path / "birds-3/seed0/sequential/task_vectors")
    with caplog.at_level(logging.WARNING):
        figures = {figure.kind: figure for figure in figures_of(tmp_path, evaluate=False)}
    assert figures["sign-conflicts"].columns == ("task vectors compared", "independent")
    assert "no origins of birds-3, seed 0, sequential: " in caplog.text


def test_settings_of_one_data_set_are_compared_after_the_last_of_them(tmp_path):
    make_suite(tmp_path, setting="birds-2", tasks=2, seeds=1)
    make_suite(tmp_path, setting="birds-3", tasks=3, seeds=1)
    make_suite(tmp_path, setting="cats", tasks=2, seeds=1)
    figures = figures_of(tmp_path, evaluate=False)
    names = [(figure.setting, figure.kind) for figure in figures]
    place = names.index(("birds", "sign-conflicts-by-tasks"))
    assert names[place - 1][0] == "birds-3"
    assert {setting for setting, _ in names[place + 1 :]} == {"cats"}
