"""`cl-merge bench` and `cl-merge report`, from the words of a command to the files it leaves."""

import json
import os
import re
import sys

import pytest

from cl_merge.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A small suite that has run: two runs that end well, and one whose images are missing."""
    root = tmp_path_factory.mktemp("bench")
    suite = root / "small.yaml"
    suite.write_text(
        "about: a small suite\n"
        "settings:\n  - {data: digits, tasks: 2}\n"
        "methods: [zero-shot, sequential, magmax, max-abs]\n"
        "run: {stream: {images_per_class: 4}, trainer: {max_epochs: 1}}\n"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("CL_MERGE_DATA", raising=False)
        code = main(
            [
                "bench",
                str(suite),
                "--data",
                "digits,pacs",
                "--out",
                str(root / "out"),
                "--no-figures",
            ]
        )
    return suite, root / "out", code


def bench(suite, out, *words):
    return main(["bench", str(suite), "--out", str(out), *words])


def test_what_fails_is_said_and_stops_nothing_else(filled):
    _, out, code = filled
    assert code == 1
    done = sorted(str(f.parent.relative_to(out)) for f in out.rglob("results.json"))
    assert done == ["digits-2/seed0/independent", "digits-2/seed0/sequential"]
    failures = [json.loads(f.read_text())["reason"] for f in out.rglob("failed.json")]
    assert len(failures) == 2
    assert all("data set 'pacs' is read from a local copy" in reason for reason in failures)


def test_a_finished_suite_does_nothing_again(filled, capsys):
    suite, out, _ = filled
    before = {
        f: f.stat().st_mtime_ns for f in out.rglob("*") if f.name in ("journal.jsonl", "log.txt")
    }
    assert bench(suite, out, "--data", "digits", "--no-figures") == 0
    assert "2 runs, all done; nothing is left to do" in " ".join(capsys.readouterr().out.split())
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_a_dry_run_writes_nothing_and_tells_states_and_times(filled, tmp_path, capsys):
    suite, out, _ = filled
    before = sorted(f for f in out.rglob("*"))
    assert bench(suite, out, "--data", "digits,pacs", "--seeds", "2", "--dry-run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "digits-2/seed0/sequential done" in said
    assert "pacs/seed0/sequential failed" in said
    assert "digits-2/seed1/sequential new" in said
    assert "16 cells (2 settings, 4 methods, 2 seeds) from 8 runs" in said
    # Those of the first seed tell how long the second takes; of the other data none has finished.
    assert re.search(r"digits-2/seed1/sequential new \d+ s", said)
    assert "pacs/seed1/sequential new ?" in said
    assert "one at a time, and 4 runs of unknown length" in said
    assert sorted(f for f in out.rglob("*")) == before
    assert bench(suite, tmp_path / "elsewhere", "--data", "digits", "--dry-run") == 0
    assert not (tmp_path / "elsewhere").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "how long they take is not known before one of them has finished" in said
    assert " left" not in said


@pytest.mark.parametrize("width", ["60", "80", "115"])
def test_a_dry_run_shows_state_and_time_beside_any_number_of_methods(
    width, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", width)
    assert bench("offline", tmp_path / "none", "--data", "digits", "--dry-run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"digits-5/seed0/sequential new \? magmax,", said)
    assert "digits-5/seed0/ewc new" in said


def test_the_folder_holds_the_report_and_the_table_in_all_forms(filled, capsys):
    _, out, _ = filled
    assert main(["report", str(out), "--no-figures"]) == 0
    assert "report.html is the report" in " ".join(capsys.readouterr().out.split())
    page = (out / "report.html").read_text()
    assert "a small suite" in page
    accuracy = json.loads((out / "digits-2/seed0/sequential/results.json").read_text())
    shown = f"{accuracy['methods']['magmax']['accuracy']:.1f}"
    for name in ("report.html", "table.md", "table.tex"):
        assert shown in (out / name).read_text()
    assert "digits-2,digits,2,magmax,accuracy" in (out / "table.csv").read_text()


@pytest.mark.parametrize(
    ("form", "start"), [("markdown", "small: "), ("latex", "% small: "), ("csv", "setting,data,")]
)
def test_a_table_is_printed_as_it_is(filled, capsys, form, start):
    _, out, _ = filled
    assert main(["report", str(out), "--format", form, "--metric", "forgetting"]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_a_single_run_has_a_report_too(filled, capsys):
    _, out, _ = filled
    assert main(["report", str(out / "digits-2/seed0/sequential")]) == 0
    assert "magmax" in capsys.readouterr().out
    assert (out / "digits-2/seed0/sequential/report.html").exists()


def test_settings_may_stand_before_and_behind_options(tmp_path, capsys):
    for words in (
        ["trainer.max_epochs=1", "--data", "digits", "stream.batch_size=16"],
        ["--data", "digits", "trainer.max_epochs=1", "stream.batch_size=16"],
    ):
        assert bench("offline", tmp_path / "out", *words, "--dry-run") == 0
    with pytest.raises(SystemExit):
        bench("offline", tmp_path / "out", "--dat", "digits", "--sedes", "3")
    assert "unrecognized arguments: --sedes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["offlin"], "unknown suite 'offlin'; did you mean 'offline'"),
        (["offline", "--tasks", "five"], "--tasks five; expected numbers with commas"),
        (
            ["offline", "optimizer.lrr=1"],
            "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'",
        ),
        (
            ["offline", "--data", "digits", "--cluster", "cluster=local", "--parallel", "2"],
            "--cluster hands on all runs at once",
        ),
        (
            ["offline", "--data", "digits", "--ddp", "2", "--parallel", "2"],
            "--ddp runs one job at a",
        ),
        (["offline", "--data", "digits", "--parallel", "0"], "parallel 0; expected 1 or more"),
        (["offline", "--data", "digits", "--cluster", "slurm"], "'slurm' is no setting"),
        (["no-such-file.yaml"], "config no-such-file.yaml: cannot be read"),
    ],
)
def test_wrong_words_are_answered_before_anything_runs(tmp_path, capsys, words, message):
    assert main(["bench", *words, "--out", str(tmp_path / "out"), "--no-figures"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("log.txt"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.max_epochs=2"], "was begun with run settings"),
        (["offline"], "holds suite 'small', not 'offline'"),
    ],
)
def test_a_folder_of_another_suite_is_left_alone(filled, capsys, words, message):
    suite, out, _ = filled
    name, rest = (words[0], []) if words == ["offline"] else (suite, words)
    assert bench(name, out, "--data", "digits", *rest) == 2
    assert message in capsys.readouterr().err


def test_the_folder_of_a_run_is_not_taken_for_that_of_a_suite(filled, capsys):
    suite, out, _ = filled
    assert bench(suite, out / "digits-2/seed0/sequential", "--data", "digits") == 2
    assert "holds a single run" in capsys.readouterr().err


def test_a_folder_of_nothing_has_no_report(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no folder of a suite" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_run_that_was_interrupted_is_named_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    terminated = tmp_path / "terminated"
    terminated.write_text("#!/bin/sh\nexit 143\n")
    terminated.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(terminated))
    words = ["--data", "digits", "--methods", "magmax", "--no-figures"]
    assert bench("offline", tmp_path / "out", *words) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "sequential/log.txt interrupted the same command tries these once more" in said


def test_two_processes_do_not_fill_one_folder(filled, capsys):
    from filelock import FileLock

    suite, out, _ = filled
    with FileLock(out / ".lock"):
        assert bench(suite, out, "--data", "digits") == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_nothing_of_a_test_stays_in_the_environment():
    assert "CL_MERGE_RUN_FOLDER" not in os.environ
