"""What is measured of task vectors: sign conflicts, consistency, origins."""

import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
from case_suite import make_run, make_suite, make_vectors

from cl_merge.benchmarks.reports.figures.style import figure_style
from cl_merge.benchmarks.reports.figures.suite_runs import Measured, SuiteRun, find_settings
from cl_merge.benchmarks.reports.figures.task_vectors import (
    draw_conflicts_over_settings,
    draw_conflicts_over_time,
    draw_consistency,
    draw_origins,
    measure_consistency,
    measure_origins,
    measure_sign_conflicts,
    parts_of,
    random_consistency,
)
from cl_merge.task_vectors.task_vector import TaskVector

MEASURES = (measure_sign_conflicts, measure_consistency, measure_origins)


@pytest.fixture(autouse=True)
def style():
    with figure_style():
        yield


def no_evaluator():
    raise AssertionError("the model was loaded for a figure that needs no evaluation")


def measure_all(suite, measure):
    """As the gallery does it: by setting, training and seed."""
    every = []
    for setting in find_settings(suite):
        measured = Measured(setting)
        for run in setting.runs:
            measured.found.setdefault(run.training, []).append(measure(run, no_evaluator))
        every.append(measured)
    return every


def rows(vectors):
    return torch.stack([torch.cat([t.reshape(-1) for t in v.values()]) for v in vectors]).double()


def naive_conflicts(vectors, density=0.2):
    values = rows(vectors)
    rank = values.shape[1] - int(density * values.shape[1])
    values = values * (values.abs() >= values.abs().kthvalue(rank, 1, keepdim=True).values)
    columns = values.t().tolist()
    return sum(min(c) < 0 < max(c) for c in columns) / sum(any(c) for c in columns)


def test_conflicts_after_each_task_are_means_over_seeds_in_per_cent(tmp_path):
    make_suite(tmp_path, setting="birds-4", tasks=4, seeds=2)
    (measured,) = measure_all(tmp_path, measure_sign_conflicts)
    drawn = draw_conflicts_over_time(measured)
    seeds = [make_vectors(4, seed) for seed in (0, 1)]
    assert drawn.columns == ("task vectors compared", "sequential", "independent")
    for row, count in zip(drawn.rows, (2, 3, 4), strict=True):
        expected = 100 * sum(naive_conflicts(vectors[:count]) for vectors in seeds) / 2
        assert row == (count, *[pytest.approx(expected, abs=0.051)] * 2)


def test_settings_of_a_data_set_are_compared_by_their_numbers_of_tasks(tmp_path):
    make_suite(tmp_path, setting="birds-2", tasks=2, seeds=1)
    make_suite(tmp_path, setting="birds-4", tasks=4, seeds=1, trainings=("sequential",))
    drawn = draw_conflicts_over_settings(*measure_all(tmp_path, measure_sign_conflicts))
    two, four = (100 * naive_conflicts(make_vectors(tasks)) for tasks in (2, 4))
    assert drawn.rows == (
        (2, pytest.approx(two, abs=0.051), pytest.approx(two, abs=0.051)),
        (4, pytest.approx(four, abs=0.051), None),
    )


def test_one_setting_is_no_comparison(tmp_path):
    make_suite(tmp_path)
    assert draw_conflicts_over_settings(*measure_all(tmp_path, measure_sign_conflicts)) is None


def test_a_single_task_has_no_conflict_to_draw(tmp_path):
    make_suite(tmp_path, setting="birds-1", tasks=1)
    assert draw_conflicts_over_time(*measure_all(tmp_path, measure_sign_conflicts)) is None
    assert draw_consistency(*measure_all(tmp_path, measure_consistency)) is None


@pytest.mark.parametrize("tasks", range(1, 9))
def test_random_signs_are_as_consistent_as_all_their_combinations_on_average(tasks):
    sums = [abs(sum(signs)) / tasks for signs in product((-1, 1), repeat=tasks)]
    assert random_consistency(tasks) == pytest.approx(sum(sums) / len(sums))


def test_consistency_takes_the_updates_that_the_training_made(tmp_path):
    one = TaskVector({"w": torch.tensor([1.0, -2.0])})
    two = TaskVector({"w": torch.tensor([0.5, -3.0])})  # back by 0.5; on by 1
    for training in ("sequential", "independent"):
        folder = make_run(tmp_path, "birds-2", training, tasks=2, vectors=[one, two])
        found = measure_consistency(SuiteRun(folder, 0, training), no_evaluator)
        known = [
            c for c, number in zip(found["consistency"], found["counts"], strict=True) if number
        ]
        assert known == ([0.0, 1.0] if training == "sequential" else [1.0, 1.0])


def test_consistency_of_random_vectors_is_that_of_random_signs(tmp_path):
    vectors = make_vectors(5, size=2000)
    make_run(tmp_path, "birds-5", "independent", tasks=5, vectors=vectors)
    (measured,) = measure_all(tmp_path, measure_consistency)
    drawn = draw_consistency(measured)
    assert len(drawn.rows) == 10
    for _, consistency in drawn.rows:
        assert consistency == pytest.approx(random_consistency(5), abs=0.03)


def test_origins_match_a_loop_over_elements_by_part_in_the_order_of_the_network(tmp_path):
    vectors = make_vectors(3)
    make_run(tmp_path, "birds-3", "sequential", vectors=vectors)
    run = find_settings(tmp_path)[0].runs[0]
    found = measure_origins(run, no_evaluator)
    expected = {}
    for name in vectors[0]:
        stack = torch.stack([vector[name].reshape(-1) for vector in vectors])
        counts = torch.bincount(stack.abs().argmax(0), minlength=3).tolist()
        part = {"conv1": "conv1", "proj": "proj"}.get(name.split(".")[1]) or name[7:].rpartition(
            "."
        )[0]
        expected[part] = counts
    assert dict(found["parts"]) == expected
    assert [part for part, _ in found["parts"]] == [
        "conv1",
        "blocks.0",
        "blocks.2",
        "blocks.10",
        "proj",
    ]


def test_origins_are_drawn_as_shares_of_each_part(tmp_path):
    make_suite(tmp_path, seeds=2)
    drawn = draw_origins(*measure_all(tmp_path, measure_origins))
    assert len(drawn.rows) == 2 * 5
    for _, _, *shares in drawn.rows:
        assert sum(shares) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            ["visual.class_embedding", "visual.transformer.resblocks.11.mlp.c_fc.bias"],
            ["class_embedding", "resblocks.11"],
        ),
        (["visual.layer1.0.conv2.weight", "visual.bn1.bias"], ["layer1.0", "bn1"]),
        (["visual.trunk.norm.weight", "visual.head.proj.weight"], ["norm", "head.proj"]),
        (["0.weight", "2.weight"], ["0", "2"]),
        (["weight"], ["weight"]),
    ],
)
def test_parts_are_blocks_or_layers(names, parts):
    assert parts_of(names) == parts


@pytest.mark.parametrize("measure", MEASURES)
def test_one_task_vector_is_held_at_a_time(tmp_path, measure):
    held = []

    def watched(path):
        assert not any(reference() for reference in held)
        vector = TaskVector.load(path)
        held.append(weakref.ref(vector))
        return vector

    class Watched(SuiteRun):
        def vectors(self):
            return (watched(file) for file in self.vector_files)

    folder = make_run(tmp_path, "birds-5", "sequential", tasks=5)
    measure(Watched(folder, 0, "sequential"), no_evaluator)
    assert len(held) == 5


_MEMORY = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from case_suite import make_run
from cl_merge.benchmarks.reports.figures.suite_runs import SuiteRun
from cl_merge.benchmarks.reports.figures.task_vectors import (
    measure_consistency, measure_origins, measure_sign_conflicts,
)
from cl_merge.task_vectors.task_vector import TaskVector

def peak(tasks):
    vectors = (TaskVector({{"w": torch.randn(2_000_000)}}) for _ in range(tasks))
    folder = make_run(Path({folder!r}), f"birds-{{tasks}}", "sequential", tasks=tasks, vectors=vectors)
    run = SuiteRun(folder, 0, "sequential")
    for measure in (measure_sign_conflicts, measure_consistency, measure_origins):
        measure(run, None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

few = peak(4)
print((peak(16) - few) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_tasks(tmp_path):
    code = _MEMORY.format(tests=str(Path(__file__).parents[3] / "support"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Of twelve more task vectors of 8 MB each: less than two.
    assert float(done.stdout) < 16
