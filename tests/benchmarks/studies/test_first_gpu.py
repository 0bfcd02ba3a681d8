"""What is done stays done, and a step that fails keeps no other from running."""

import sys

import pytest

from cl_merge.benchmarks.studies import first_gpu
from cl_merge.benchmarks.studies.first_gpu import Step, run, steps


def test_the_most_important_comes_first_and_photographs_only_where_there_are_some(tmp_path):
    names = [step.name for step in steps(tmp_path, tmp_path, tiny=True)]
    assert (*names[:2], names[-1]) == ("steps", "table", "tests")
    assert names.index("ddp") < names.index("export") < names.index("predict")
    assert "table" not in [step.name for step in steps(tmp_path, None, tiny=False)]


@pytest.mark.parametrize(
    ("code", "seconds", "ended"),
    [
        ("print('fine')", 60, "well"),
        ("raise SystemExit(3)", 60, "failed with exit code 3"),
        ("import time; time.sleep(60)", 1, "stopped: no time was left"),
        ("", 0, "not begun"),
    ],
)
def test_how_a_step_ended_is_said(tmp_path, code, seconds, ended):
    step = Step("one", [sys.executable, "-c", code])
    assert run(step, tmp_path, seconds).startswith(ended)
    again = run(Step("one", [sys.executable, "-c", ""]), tmp_path, 60)
    assert again == ("done before" if ended == "well" else "well")


def test_one_failure_is_the_exit_code_of_all(tmp_path, monkeypatch, capsys):
    made = [Step("bad", [sys.executable, "-c", "1/0"]), Step("good", [sys.executable, "-c", ""])]
    monkeypatch.setattr(first_gpu, "steps", lambda *_: made)
    monkeypatch.setattr(sys, "argv", ["first_gpu", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        first_gpu.main()
    assert ended.value.code == 1
    assert "good well" in capsys.readouterr().out
    assert "ZeroDivisionError" in (tmp_path / "out" / "bad.txt").read_text()
