"""What was measured is kept until a run or the options change."""

import json
import math

import pytest
from case_suite import make_run

from cl_merge.benchmarks.reports.figures.runs import SuiteRun
from cl_merge.benchmarks.reports.figures.store import Store


@pytest.fixture
def run(tmp_path):
    return SuiteRun(make_run(tmp_path, "birds-3", "sequential"), 0, "sequential")


def never():
    raise AssertionError("measured again")


def test_a_measure_is_taken_once_and_comes_back_as_json_holds_it(tmp_path, run):
    file = tmp_path / "analysis/birds-3/kind-seed0.json"
    first = Store(file, {"bins": 3}).get_or_make(run, lambda: {"a": (1.0, math.nan)})
    assert first == {"a": [1.0, None]}
    assert Store(file, {"bins": 3}).get_or_make(run, never) == first


def test_other_options_or_other_results_make_it_stale(tmp_path, run):
    file = tmp_path / "kind-seed0.json"
    Store(file, {"bins": 3}).get_or_make(run, lambda: {"a": 1})
    assert Store(file, {"bins": 4}).get(run) is None
    (run.folder / "results.json").write_text("{}")
    changed = SuiteRun(run.folder, 0, "sequential")
    assert Store(file, {"bins": 3}).get(changed) is None
    assert Store(file, {"bins": 3}).get_or_make(changed, lambda: {"a": 2}) == {"a": 2}


def test_trainings_are_kept_side_by_side(tmp_path, run):
    other = SuiteRun(make_run(tmp_path, "birds-3", "independent"), 0, "independent")
    file = tmp_path / "kind-seed0.json"
    store = Store(file)
    store.get_or_make(run, lambda: 1)
    store.get_or_make(other, lambda: 2)
    assert (Store(file).get(run), Store(file).get(other)) == (1, 2)
    assert sorted(json.loads(file.read_text())["trainings"]) == ["independent", "sequential"]


def test_a_measure_that_fails_leaves_nothing(tmp_path, run):
    file = tmp_path / "kind-seed0.json"
    with pytest.raises(AssertionError):
        Store(file).get_or_make(run, never)
    assert not file.exists()
