"""Commands where output is closed, or cannot be written as it is."""

import os
import subprocess
import sys

import pytest

from cl_merge import cli


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
    done = shell("cl-merge bench offline --data digits --dry-run | true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    run = "run stream.tasks=2 stream.images_per_class=4 compare=false out=run"
    done = shell(f"cl-merge {run} | head -1", tmp_path)
    assert done.stdout.startswith("loaded glyph")
    assert done.returncode == 141
    assert done.stderr == (
        "cl-merge: nobody reads the output any more; go on with: cl-merge run out=run\n"
    )


def test_a_command_whose_output_is_closed_does_its_work(tmp_path):
    done = shell("cl-merge bench offline --data digits --dry-run >&- 2>&-", tmp_path)
    assert done.returncode == 0


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
