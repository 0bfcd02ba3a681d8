"""Running the jobs of a suite: side by side, whatever happens to one of them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from results_files import whole_results

from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.benchmarks.suites.execution import Processes, run_here, run_job, run_on_cluster
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, jobs_of, make_plan, state_of
from cl_merge.data.sampling import SIDE_BY_SIDE
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow

# Stands for `cl-merge`: does what the training's name says that it should.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

out = Path(sys.argv[-1].removeprefix("out="))
begun = time.monotonic()
deaf = "DEAF" in os.environ
signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: sys.exit(143))
(out / "journal.jsonl").touch()
(out / "environment.json").write_text(json.dumps(dict(os.environ)))
if out.name in os.environ.get("FAILING", "").split(","):
    print("some warning\\ncl-merge: the disk is on fire\\n")
    sys.exit(2)
if out.name in os.environ.get("DYING", "").split(","):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(os.environ.get("SECONDS", "0")))
(out / "times.json").write_text(json.dumps([begun, time.monotonic()]))
(out / "results.json").write_text(os.environ["RESULTS"])
"""


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    found = jobs_of(make_plan(narrowed(find_suite("offline"), data=["digits"])))
    names = sorted({name for job in found for name in job.methods})
    results = whole_results({"methods": {name: {"accuracy": 50.0} for name in names}})
    monkeypatch.setenv("RESULTS", json.dumps(results))
    return found


@pytest.fixture
def stand_in(jobs, tmp_path):
    """Runs the stand-in for every job."""
    return Processes((sys.executable, str(tmp_path / "stand_in.py")))


def test_each_job_runs_once_and_leaves_its_log(jobs, stand_in, tmp_path):
    ended = list(run_here(jobs, tmp_path, processes=stand_in))
    assert [e.job for e in ended] == jobs
    assert {e.state for e in ended} == {DONE}
    assert all(
        (tmp_path / job.path / "log.txt").read_text().startswith("cl-merge run") for job in jobs
    )


def test_a_failed_job_is_reported_and_stops_no_other(jobs, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING", "lwf")
    monkeypatch.setenv("DYING", "ewc")
    ended = {e.job.training: e for e in run_here(jobs, tmp_path, processes=stand_in)}
    assert ended["lwf"].reason == "the disk is on fire"
    assert ended["ewc"].reason == "ended by signal SIGKILL"
    assert {name for name, e in ended.items() if e.state == FAILED} == {"lwf", "ewc"}
    assert json.loads((tmp_path / ended["lwf"].job.path / "failed.json").read_text())["reason"]
    monkeypatch.delenv("FAILING")
    (again,) = run_here([ended["lwf"].job], tmp_path, processes=stand_in)
    assert again.state == DONE
    assert not (tmp_path / again.job.path / "failed.json").exists()


def test_jobs_run_side_by_side_with_their_share_of_the_cores(jobs, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDS", "1.0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    list(run_here(jobs[:2], tmp_path, parallel=2, processes=stand_in))
    times = [json.loads((tmp_path / job.path / "times.json").read_text()) for job in jobs[:2]]
    assert max(begun for begun, _ in times) < min(end for _, end in times)
    threads = [environment(tmp_path, job)["OMP_NUM_THREADS"] for job in jobs[:2]]
    assert threads == ["4", "4"]
    runs = [environment(tmp_path, job)[SIDE_BY_SIDE] for job in jobs[:2]]
    assert runs == ["2", "2"]


def test_each_of_several_gpus_has_a_job_of_its_own(jobs, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setenv("SECONDS", "0.5")
    list(run_here(jobs[:4], tmp_path, processes=stand_in))
    seen = [environment(tmp_path, job)["CUDA_VISIBLE_DEVICES"] for job in jobs[:4]]
    assert sorted(seen) == ["2", "2", "5", "5"]
    list(
        run_here(jobs[:1], tmp_path, parallel=1, processes=stand_in)
    )  # one alone may train on both
    assert environment(tmp_path, jobs[0])["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_a_job_that_is_alone_under_slurm_starts_its_processes_itself(
    jobs, stand_in, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_NAME", "exp")
    for tasks, name in (("1", "interactive"), ("8", "exp")):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        list(run_here(jobs[:1], tmp_path, processes=stand_in))
        assert environment(tmp_path, jobs[0])["SLURM_JOB_NAME"] == name


def test_no_job_runs_before_the_first_is_asked_for_and_none_side_by_side_with_nobody(
    jobs, tmp_path
):
    with pytest.raises(InputError, match="^parallel 0; expected 1 or more"):
        list(run_here(jobs, tmp_path, parallel=0))


@pytest.mark.parametrize("deaf", [False, True])
def test_an_interruption_ends_the_jobs_and_they_can_go_on(
    jobs, stand_in, tmp_path, monkeypatch, deaf
):
    monkeypatch.setenv("SECONDS", "60")
    if deaf:
        stand_in.patience = 0.5
        monkeypatch.setenv("DEAF", "1")

    def interrupt():
        while not (tmp_path / jobs[0].path / "environment.json").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_here(jobs, tmp_path, processes=stand_in))
    assert time.monotonic() - begin < 30
    assert state_of(jobs[0], tmp_path) == BEGUN
    assert not (tmp_path / jobs[1].path).exists()


def test_a_job_that_starts_while_all_are_stopped_ends_at_once(
    jobs, stand_in, tmp_path, monkeypatch
):
    monkeypatch.setenv("SECONDS", "60")
    stand_in.stop()
    ended = run_job(jobs[0], tmp_path, processes=stand_in)
    assert (ended.state, ended.reason) == (BEGUN, "interrupted")
    assert ended.seconds < 30


def test_the_reason_of_a_failure_is_that_of_the_last_try(jobs, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING", jobs[0].training)
    assert run_job(jobs[0], tmp_path, processes=stand_in).reason == "the disk is on fire"
    monkeypatch.delenv("FAILING")
    monkeypatch.delenv("RESULTS")
    assert run_job(jobs[0], tmp_path, processes=stand_in).reason == "KeyError: 'RESULTS'"


def test_a_cluster_runs_the_same_jobs(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    # The workers of a cluster import the library anew: a run that fails at once shows the way there
    # and back without a training.
    suite = narrowed(find_suite("offline"), data=["pacs"], methods=["joint"])
    monkeypatch.delenv("CL_MERGE_DATA", raising=False)
    (job,) = jobs_of(make_plan(suite))
    (ended,) = run_on_cluster([job], tmp_path, {"cluster": "local", "timeout_min": 5})
    assert ended.state == FAILED
    assert "CL_MERGE_DATA" in ended.reason
    assert state_of(job, tmp_path) == FAILED


def test_a_wrong_parameter_of_a_cluster_is_named(jobs, tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match="^cluster: .*slurm_partitoin"):
        list(run_on_cluster(jobs, tmp_path, {"cluster": "local", "slurm_partitoin": "gpu"}))


def environment(folder, job):
    return json.loads((folder / job.path / "environment.json").read_text())


def test_a_suite_that_is_killed_by_a_scheduler_interrupts_its_runs(tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2; exec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    code = (
        f"import sys; from cl_merge.cli import main; sys.executable = {str(python)!r}; "
        f"sys.exit(main(['bench', 'offline', '--data', 'digits', '--out', {str(tmp_path / 's')!r}]))"
    )
    environment = os.environ | {"SECONDS": "60", "RESULTS": "{}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        begun = tmp_path / "s" / "digits-5" / "seed0" / "sequential" / "environment.json"
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(0.3)
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 143
    assert said == "cl-merge: terminated; what was finished is kept; go on with: the same command\n"
