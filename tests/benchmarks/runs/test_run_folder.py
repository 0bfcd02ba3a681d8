"""The folder of a run."""

import os

import pytest
from results_files import write_results_file

from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.runs.run_folder import RunFolder
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
