"""What needs an evaluation: pruning and scale, with a stand-in for the model."""

import pytest
import torch
from case_suite import make_run, make_suite, make_vectors

from cl_merge.benchmarks.reports.figures.evaluated import (
    SCALES,
    SHARES,
    draw_pruning,
    draw_scale,
    measure_pruning,
    measure_scale,
)
from cl_merge.benchmarks.reports.figures.style import figure_style
from cl_merge.benchmarks.reports.figures.suite_runs import Measured, find_settings


class StandIn:
    """A model whose accuracy tells what was added to its weights."""

    def __init__(self):
        self.images = 0

    def counts(self, changes, scale, task=None):
        values = torch.cat([tensor.reshape(-1) for _, tensor in changes])
        hits = round(float((scale * values).abs().sum()))
        row = torch.zeros(3, 3, dtype=torch.int64)
        row[1:, task] = torch.tensor([hits, 1000])
        self.images += 10
        return row

    def accuracy(self, changes, scale):
        self.images += 30
        return scale * sum(float(tensor.sum()) for _, tensor in changes)


@pytest.fixture
def stand_in():
    return StandIn()


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path, "birds-3", "sequential")
    return find_settings(tmp_path)[0].runs[0]


def test_pruning_matches_a_sort_of_each_task_vector(run, stand_in):
    found = measure_pruning(run, lambda: stand_in)
    for task, vector in enumerate(make_vectors(3)):
        values = torch.cat([tensor.reshape(-1) for tensor in vector.values()]).abs().sort().values
        assert found["whole"][task] == pytest.approx(float(values.sum()) / 10, abs=0.06)
        for place, share in enumerate(SHARES):
            number = max(1, round(share * len(values)))
            highest, lowest = float(values[-number:].sum()), float(values[:number].sum())
            kept = {which: found["kept"][which][task][place] for which in found["kept"]}
            assert kept["highest"] == pytest.approx(highest / 10, abs=0.06)
            assert kept["lowest"] == pytest.approx(lowest / 10, abs=0.06)
            assert kept["lowest"] <= kept["random"] <= kept["highest"] + 0.06
    assert stand_in.images == 30 * (1 + 3 * len(SHARES))


def test_pruning_is_drawn_as_the_mean_over_tasks_and_seeds(tmp_path, stand_in):
    make_suite(tmp_path, seeds=2, trainings=("independent",))
    (setting,) = find_settings(tmp_path)
    found = [measure_pruning(run, lambda: stand_in) for run in setting.runs]
    with figure_style():
        drawn = draw_pruning(Measured(setting, {"independent": found}))
    expected = [
        sum(sum(f["kept"]["highest"][task][place] for task in range(3)) for f in found) / 6
        for place in range(len(SHARES))
    ]
    (row,) = [row for row in drawn.rows if row[1] == "highest"]
    assert row[2:-1] == pytest.approx(expected, abs=0.051)
    zero_shot = sum(sum(f["zero_shot"]) for f in found) / 6
    (row,) = [row for row in drawn.rows if row[1] == "none (zero-shot)"]
    assert row[2:] == pytest.approx([zero_shot] * (len(SHARES) + 1), abs=0.051)


def test_each_merger_is_evaluated_at_each_scale_but_those_that_the_run_knows(run, stand_in):
    found = measure_scale(run, lambda: stand_in)["methods"]
    vectors = make_vectors(3)
    flat = torch.stack([torch.cat([t.reshape(-1) for t in v.values()]) for v in vectors])
    largest = flat.gather(0, flat.abs().argmax(0, keepdim=True))
    totals = {"magmax": float(largest.sum()), "average-sequential": float(flat.mean(0).sum())}
    assert list(found) == list(totals)
    for name, total in totals.items():
        of_method, known = found[name], run.results["methods"]
        assert of_method["scales"] == sorted({*SCALES, 0.5})
        for scale, accuracy in zip(of_method["scales"], of_method["accuracy"], strict=True):
            expected = {0.0: known["zero-shot"]["accuracy"], 0.5: known[name]["accuracy"]}
            assert accuracy == pytest.approx(expected.get(scale, scale * total), rel=1e-4, abs=1e-3)
        assert of_method["own"] == 0.5
    # Nothing of the merge, and the method's own scale, are known.
    assert stand_in.images == 30 * 2 * (len(SCALES) - 2)


def test_scales_are_drawn_as_means_over_seeds(tmp_path, stand_in):
    make_suite(tmp_path, seeds=2, trainings=("sequential", "lwf"))
    (setting,) = find_settings(tmp_path)
    found = {}
    for run in setting.runs:
        found.setdefault(run.training, []).append(measure_scale(run, lambda: stand_in))
    with figure_style():
        drawn = draw_scale(Measured(setting, found))
    assert [row[0] for row in drawn.rows] == ["magmax", "lwf-magmax", "average-sequential"]
    seeds = [f["methods"]["magmax"] for f in found["sequential"]]
    expected = [
        sum(seed["accuracy"][seed["scales"].index(scale)] for seed in seeds) / 2 for scale in SCALES
    ]
    assert drawn.rows[0][3:] == pytest.approx(expected, abs=0.051)
    assert "not a way to choose a scale" in drawn.caption
