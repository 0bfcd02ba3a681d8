"""The command line around a run: exit codes and interruptions."""

import logging
import os
import subprocess
import sys

import pytest

from cl_merge import __version__, cli
from cl_merge.cli.process import share_cores


def interrupted_by_lightning(*_):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("run", [interrupted, interrupted_by_lightning])
def test_ctrl_c_is_said_and_has_the_usual_exit_code(run, monkeypatch, capsys):
    monkeypatch.setattr(cli.run, "run", run)
    assert cli.main(["run"]) == 130
    assert capsys.readouterr().err.startswith("cl-merge: interrupted")


def test_any_other_exit_goes_through(monkeypatch):
    monkeypatch.setattr(cli.run, "run", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run"])
    assert stop.value.code == 3


@pytest.mark.slow
def test_the_program_is_installed_and_tells_its_version():
    found = subprocess.run(
        [sys.executable, "-m", "cl_merge.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert found.stdout.strip() == __version__


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "usage: cl-merge" in capsys.readouterr().err


def test_the_command_line_leaves_the_callers_logging_as_it_was(capsys, tmp_path):
    library = logging.getLogger("cl_merge")
    before = library.handlers, library.propagate, library.level
    assert cli.main(["report", str(tmp_path)]) == 2
    assert (library.handlers, library.propagate, library.level) == before


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_that_wait_give_their_core_away_unless_the_user_says_how(given, then, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    share_cores()
    assert os.environ == then


@pytest.mark.parametrize("stop", [interrupted, interrupted_by_lightning])
def test_an_interrupted_suite_says_how_to_go_on(stop, monkeypatch, capsys, tmp_path):
    # Also where it draws its figures.
    monkeypatch.setattr("cl_merge.cli.bench._run", lambda *_: [])
    monkeypatch.setattr("cl_merge.cli.report.make_report", lambda *_, **__: stop())
    words = ["--data", "digits", "--methods", "magmax", "--out", str(tmp_path)]
    assert cli.main(["bench", "offline", *words]) == 130
    assert "go on with: the same command" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge", "base", "task", "--out", "m", "--density", "0.3"],
            "Options of a method follow --set, as in --set density=0.3",
        ),
        (["merge", "base", "task", "--out", "m", "--weights", "1"], "did you mean '--weight'?"),
        (["run", "--stream.tasks", "5"], "Settings are written without dashes"),
        (["bench", "offline", "--sedes", "3"], "--sedes; did you mean '--seeds'?"),
    ],
)
def test_an_unknown_option_shows_the_usage_of_its_command_and_what_was_meant(
    words, message, capsys
):
    with pytest.raises(SystemExit):
        cli.main(words)
    complained = capsys.readouterr().err
    assert f"usage: cl-merge {words[0]}" in complained
    assert message in complained
