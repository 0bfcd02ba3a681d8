"""The folder of a run."""

import json
import os

import pytest
from results_files import write_results_file

from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.runs.run_folder import RunFolder
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.errors import InputError


def test_results_are_read_again_only_when_they_have_changed(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.results() == {}
    write_results_file(tmp_path, {"methods": {"magmax": {}}})
    assert folder.results() is folder.results()
    write_results_file(tmp_path, {"methods": {"ties": {}}})
    os.utime(tmp_path / "results.json", (0, 0))  # clocks of file systems are coarse
    assert "ties" in folder.results()["methods"]


def test_the_command_that_goes_on_can_be_pasted_into_a_shell(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    with pytest.raises(InputError, match=f"go on with: cl-merge run 'out={folder}'$"):
        finished_results(folder)


@pytest.mark.parametrize(
    ("former", "warned"),
    [({}, False), ({"processor": "Z80, DEFAULT"}, True), ({"threads": 99}, True)],
    ids=["the same, of an earlier version", "another processor", "more threads"],
)
def test_a_run_that_goes_on_elsewhere_is_warned_of(tmp_path, caplog, former, warned):
    config = read_settings([f"out={tmp_path}"])
    RunFolder.claim(config, "run").release()
    journal = tmp_path / "journal.jsonl"
    record = json.loads(journal.read_text())
    del record["circumstances"]["processor"]
    record["circumstances"] |= former
    journal.write_text(json.dumps(record) + "\n")
    RunFolder.claim(config, "run").release()
    assert ("may differ in the last digits" in caplog.text) == warned
