"""What a suite's folder was asked for before, and what it is asked for now."""

from dataclasses import replace

import pytest

from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.benchmarks.suites.suite_folder import read_folder, remember
from cl_merge.errors import InputError


def test_a_folder_is_not_asked_for_other_settings_of_runs_that_it_has(tmp_path):
    suite = narrowed(find_suite("offline"), data=["digits"])
    remember(suite, tmp_path)
    (setting,) = suite.settings
    with pytest.raises(InputError, match="was begun with run of digits-5 none, not {'epochs'"):
        remember(replace(suite, settings=(replace(setting, run={"epochs": [1]}),)), tmp_path)
    remember(narrowed(find_suite("offline"), data=["pacs"]), tmp_path)
    assert [s.name for s in read_folder(tmp_path).settings] == ["digits-5", "pacs"]
