"""How long a suite will take."""

import pytest

from cl_merge.benchmarks.suites import estimate as module
from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.benchmarks.suites.estimate import Size, estimate, passes, seconds_per_pass
from cl_merge.benchmarks.suites.plan import job_config, jobs_of, make_plan


def jobs(**choice):
    found = jobs_of(make_plan(narrowed(find_suite("offline"), **choice)))
    return {job.training: job for job in found}


def test_passes_count_every_image_that_goes_through_the_model():
    found = jobs(data=["digits"], run=["trainer.max_epochs=4"])
    size = Size(train=1000, test=100, tasks=5)
    job = found["independent"]
    evaluations = 1 + 5 * len(job.methods)  # zero-shot, and every method after every task
    assert passes(job, job_config(job), size) == 100 * evaluations + 1000 * 4 * 3
    lwf = found["lwf"]
    assert passes(lwf, job_config(lwf), size) == 100 * (1 + 5 * 2) + 1000 * 4 * 4
    joint = found["joint"]
    assert passes(joint, job_config(joint), size) == 100 * 2 + 1000 * 4 * 3
    last = jobs(data=["digits"], run=["trainer.max_epochs=4", "evaluate=last"])["lwf"]
    assert passes(last, job_config(last), size) == 100 * 3 + 1000 * 4 * 4


def test_what_has_run_tells_how_long_the_rest_takes(write_results, tmp_path):
    found = jobs(data=["digits"])
    done, left = found["sequential"], found["independent"]
    write_results(done, dict.fromkeys(done.methods, 50.0), seconds=100.0, tasks=5)
    seconds = estimate(list(found.values()), tmp_path)
    size = Size(train=500, test=250, tasks=5)
    ratio = passes(left, job_config(left), size) / passes(done, job_config(done), size)
    assert seconds[left.place] == pytest.approx(100.0 * ratio)
    assert seconds[done.place] == pytest.approx(100.0)


def test_if_nothing_has_run_a_model_is_timed_once_for_all_jobs(monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(module, "seconds_per_pass", lambda *kind: timed.append(kind) or 0.001)
    found = jobs(data=["digits"])
    seconds = estimate(list(found.values()), tmp_path)
    assert timed == [("glyph", None)]
    joint = found["joint"]
    size = Size(train=1437, test=360, tasks=5)
    assert seconds[joint.place] == pytest.approx(0.001 * passes(joint, job_config(joint), size))


def test_data_of_unknown_size_is_said_to_be_unknown(tmp_path):
    found = jobs(data=[str(tmp_path)])
    assert set(estimate(list(found.values()), tmp_path).values()) == {None}


@pytest.mark.parametrize("model", ["glyph", "RN50:openai"])
def test_a_model_is_timed_without_its_weights(model):
    assert 0 < seconds_per_pass(model, None) < 10
