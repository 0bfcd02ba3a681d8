"""Commands where output is closed, or cannot be written as it is."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from cl_merge import cli
from cl_merge.benchmarks.reports.run_terminal import results_table
from cl_merge.benchmarks.suites.definition import find_suite
from cl_merge.benchmarks.suites.execution import Ended
from cl_merge.benchmarks.suites.plan import FAILED, jobs_of, make_plan
from cl_merge.benchmarks.suites.terminal import show_ended

pytestmark = pytest.mark.slow


def shell(line, folder, **environment):
    command = f"{sys.executable} -m cl_merge.cli"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("cl-merge", command)],
        cwd=folder,
        # What other libraries warn of depends on their versions.
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        errors="replace",
    )


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")
    done = shell("cl-merge inspect w.safetensors | true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    run = "run stream.tasks=2 stream.images_per_class=4 compare=false out=run"
    done = shell(f"cl-merge {run} | head -1", tmp_path)
    assert done.stdout.startswith("loaded glyph")
    assert done.returncode == 141
    assert done.stderr == (
        "cl-merge: nobody reads the output any more; go on with: cl-merge run out=run\n"
    )


def test_a_command_whose_output_is_closed_does_its_work(tmp_path):
    for number, name in enumerate(("base", "task")):
        save_file({"w": torch.full((4,), float(number))}, tmp_path / f"{name}.safetensors")
    words = "base.safetensors task.safetensors --scale 1 -o merged.safetensors"
    done = shell(f"cl-merge merge {words} >&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert load_file(tmp_path / "merged.safetensors")["w"].tolist() == [1] * 4


def test_a_terminal_without_such_characters_gets_others(tmp_path):
    done = shell("cl-merge inspect 'h\u00fcbsch.pt'", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith("cl-merge: there is no file or folder 'h\\xfcbsch.pt'")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", "a\udcffb"])
def test_a_message_is_one_line_without_control_characters(name, capsys):
    assert cli.main(["inspect", name]) == 2
    said = capsys.readouterr().err
    assert said == f"cl-merge: there is no file or folder '{name!r}'; check the path\n".replace(
        f"'{name!r}'", repr(name)
    )


def test_folders_may_be_called_what_rich_takes_for_markup(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    run = shutil.copytree(finished, tmp_path / "[" / "red]" / "o[" / "y]")
    results = json.loads((run / "results.json").read_text())
    results["model"] = results["tasks"][0]["name"] = "[/x]"
    results["methods"]["mine.py:[/y]"] = results["methods"]["magmax"]
    assert "digits with [/x]" in printed(results_table(results))
    assert cli.main(["report", str(run), "--no-figures"]) == 0
    assert "[/red]/o[/y]/report.html is the report" in capsys.readouterr().out
    assert cli.main(["run", f"out={str(run)!r}"]) == 0
    assert "o[/y] holds" in " ".join(capsys.readouterr().out.split())


def test_the_reason_of_a_failure_is_shown_as_it_is(tmp_path):
    (job, *_) = jobs_of(make_plan(find_suite("offline")))
    ended = Ended(job, FAILED, 1.0, "[rank1]: RuntimeError: [/bad]")
    console = Console(file=io.StringIO(), width=200)
    show_ended(console, ended, 1, 2, tmp_path)
    assert "failed [rank1]: RuntimeError: [/bad]" in console.file.getvalue()


def printed(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_a_terminal_of_no_width_shows_something(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")
    assert cli.main(["bench", "offline", "--data", "digits", "--dry-run"]) == 0
    assert "digits" in capsys.readouterr().out
    assert os.environ["COLUMNS"] == "0"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run", "out={}"], "/results.json' cannot be read (File name too long)"),
        (["run", "out=x", "--config", "{}"], ": cannot be read (File name too long)"),
        (["predict", "run", "{}.png"], ".png': File name too long"),
        (["inspect", "{}.pt"], ".pt' cannot be read (File name too long)"),
        (
            ["merge", "{0}.pt", "{0}.pt", "-o", "m.safetensors"],
            "cannot be read (File name too long)",
        ),
        (["report", "{}"], "': File name too long"),
    ],
)
def test_names_that_are_too_long_are_one_line(words, reason, capsys):
    words = [word.format("a" * 300) for word in words]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("cl-merge: ")
    assert said.endswith(f"{reason}\n")
    assert said.count("\n") == 1
