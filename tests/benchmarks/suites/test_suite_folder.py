"""What a suite's folder was asked for before, and what it is asked for now."""

from dataclasses import replace

import pytest
from results_files import write_results_file

from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.benchmarks.suites.plan import job_config, jobs_of, make_plan, on_devices
from cl_merge.benchmarks.suites.suite_folder import (
    read_folder,
    remember,
    together,
    warn_of_other_settings,
)
from cl_merge.benchmarks.suites.terminal import expected_seconds
from cl_merge.cli import main
from cl_merge.config.reading import to_yaml
from cl_merge.errors import InputError


def test_a_folder_is_not_asked_for_other_settings_of_runs_that_it_has(tmp_path):
    suite = narrowed(find_suite("offline"), data=["digits"])
    remember(suite, tmp_path)
    (setting,) = suite.settings
    with pytest.raises(InputError, match="was begun with run of digits-5 none, not {'epochs'"):
        remember(replace(suite, settings=(replace(setting, run={"epochs": [1]}),)), tmp_path)
    remember(narrowed(find_suite("offline"), data=["pacs"]), tmp_path)
    assert [s.name for s in read_folder(tmp_path).settings] == ["digits-5", "pacs"]


def test_a_plan_for_a_folder_of_something_else_is_refused_before_it_is_shown(tmp_path):
    remember(narrowed(find_suite("offline"), data=["digits"]), tmp_path)
    with pytest.raises(InputError, match="holds suite 'offline', not 'table1'"):
        together(find_suite("table1"), tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    with pytest.raises(InputError, match="holds a single run"):
        together(find_suite("offline"), tmp_path / "run")


@pytest.fixture
def finished(tmp_path, write_results):
    """The jobs of a suite with their configurations, and a function that finishes one of them."""
    suite = narrowed(find_suite("offline"), data=["digits"], methods=["joint", "magmax"], seeds="2")
    jobs = {job: job_config(job) for job in jobs_of(make_plan(suite))}

    def finish(job, config):
        folder = write_results(job, dict.fromkeys(job.methods, 50.0), tasks=5)
        (folder / "config.yaml").write_text(to_yaml(config))

    return jobs, finish


def test_finished_runs_with_other_settings_are_named(finished, tmp_path, caplog):
    jobs, finish = finished
    for job in jobs:
        finish(job, job_config(on_devices(job, 2)))  # which gives the same
    warn_of_other_settings(jobs, tmp_path)
    assert not caplog.messages
    first, second = (job for job in jobs if job.training == "sequential")
    jobs[first].optimizer.lr = 0.5  # the recipe was edited
    finish(second, jobs[first])  # a run was copied to a wrong place
    warn_of_other_settings(jobs, tmp_path)
    (said,) = caplog.messages
    assert "2 finished runs of" in said
    assert "digits-5/seed0/sequential (optimizer.lr=0.001, not 0.5); they stay" in said


def test_a_finished_run_that_is_given_a_method_takes_as_long_as_to_evaluate_it(finished, tmp_path):
    jobs, _ = finished
    job, other = (job for job in jobs if job.training == "sequential")
    cost = {"seconds": 80.0, "peak_memory": 0, "peak_device_memory": 0}
    results = {
        "methods": {name: {} for name in ("zero-shot", *job.methods[1:])},
        "training": {"sequential": [cost, cost]},
        "total": cost | {"seconds": 160.0 + 10.0 * len(job.methods)},
    }
    (tmp_path / job.path).mkdir(parents=True)
    write_results_file(tmp_path / job.path, results)
    seconds = expected_seconds([job, other], tmp_path)
    assert seconds[job] == pytest.approx(10.0)
    assert seconds[other] == results["total"]["seconds"]


def test_a_suite_is_reported_where_the_files_of_its_data_sets_are_not(tmp_path, capsys):
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text("source: /photos\n")
    data = narrowed(find_suite("offline"), data=[str(file)], tasks=[2], methods=["magmax"])
    out.mkdir()
    remember(data, out)
    file.unlink()
    assert main(["report", str(out), "--format", "markdown"]) == 0
    assert "| magmax |  |" in capsys.readouterr().out
    # But no run begins without them.
    assert main(["bench", "offline", "--data", str(file), "--out", str(out), "--dry-run"]) == 2
    assert "mine.yaml: cannot be read" in capsys.readouterr().err
