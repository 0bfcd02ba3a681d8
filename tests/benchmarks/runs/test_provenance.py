"""The command that a result says is the one that finds it again."""

import shlex
import subprocess

import pytest

from cl_merge.benchmarks.runs.provenance import command_of, settings_of, source_commit
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.suites.definition import find_suite, known_suites
from cl_merge.benchmarks.suites.plan import job_config, jobs_of, make_plan

WORDS = {
    "defaults": [],
    "a recipe of its own": ["data=cifar100", "model=glyph", "stream.tasks=10"],
    "scales by pattern": ["merge.scale={'visual.*': 0.3, 'b c': 1e-5}"],
    "options by name": ["loggers={csv: {}, wandb: {project: 'a b'}}", "merge.options.density=0.1"],
    "lists and nothing": ["stream.order=[1,0]", "epochs=[1,2]", "prompts=null", "compare=[]"],
    "text that looks like more": ["prompts=[\"a {} b, c: 'd'\"]", "model='lite '", "method=ties"],
    "what a setting decides": ["merge.scale=auto", "trainer.max_epochs=3"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_command_reads_back_as_the_configuration_it_is_of(words):
    config = read_settings([*words, "out=here"])
    command = command_of(config)
    again = read_settings(shlex.split(command)[2:])
    config.out = None
    assert again == config
    assert set(settings_of(command)) == {w.partition("=")[0] for w in shlex.split(command)[2:]}


@pytest.mark.slow
@pytest.mark.parametrize("suite", known_suites())
def test_every_run_of_the_suites_has_such_a_command(suite):
    # The first seed stands for the others.
    jobs = jobs_of(make_plan(find_suite(suite)))
    for job in [job for job in jobs if job.seed == jobs[0].seed][::4]:
        config = job_config(job)
        assert read_settings(shlex.split(command_of(config))[2:]) == config, job.path


def test_the_commit_is_that_of_this_code_and_of_no_repository_around_it(tmp_path, monkeypatch):
    package = tmp_path / "environment" / "cl_merge"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def git(*words):
        name = ["-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
        subprocess.run(["git", *name, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "other.py").touch()
    git("add", "other.py")
    git("commit", "-m", "other")
    monkeypatch.setattr("cl_merge.__file__", str(package / "__init__.py"))
    before = source_commit()
    git("add", ".")
    git("commit", "-m", "all")
    head = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert (before, source_commit()) == (None, head)
    (package / "__init__.py").write_text("changed = 1\n")
    assert source_commit() == f"{head}-dirty"
