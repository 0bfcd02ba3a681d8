"""The folder of a run."""

import os

from results_files import write_results_file

from cl_merge.benchmarks.runs.run_folder import RunFolder


def test_results_are_read_again_only_when_they_have_changed(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.results() == {}
    write_results_file(tmp_path, {"methods": {"magmax": {}}})
    assert folder.results() is folder.results()
    write_results_file(tmp_path, {"methods": {"ties": {}}})
    os.utime(tmp_path / "results.json", (0, 0))  # clocks of file systems are coarse
    assert "ties" in folder.results()["methods"]
