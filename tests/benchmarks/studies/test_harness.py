"""Clocks, and the order in which alternatives take turns."""

import time

import pytest
import torch

from cl_merge.benchmarks.studies.harness import (
    Spread,
    Stopwatch,
    alone,
    alternated,
    by_setting,
    mean_and_spread,
    task_vectors,
)
from cl_merge.errors import InputError
from cl_merge.task_vectors.task_vector import TaskVector


def test_a_stopwatch_adds_up_stretches_and_leaves_out_what_is_between():
    watch = Stopwatch()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
        time.sleep(0.2)
    assert 0.04 <= watch.wall < 0.2
    assert watch.cpu < 0.04, "asleep, a process uses no processor"


def test_a_stopwatch_stops_when_the_work_fails():
    watch = Stopwatch()
    with pytest.raises(ValueError, match="broken"), watch:
        raise ValueError("broken")
    assert 0 <= watch.wall < 1


def test_alternatives_take_turns_and_their_results_stay_in_order():
    order = []

    def work(name):
        order.append(name)
        return f"{name}{len(order)}"

    found = alternated({name: lambda name=name: work(name) for name in "abc"}, repeat=3)
    assert "".join(order) == "abccbaabc"
    assert found == {"a": ["a1", "a6", "a7"], "b": ["b2", "b5", "b8"], "c": ["c3", "c4", "c9"]}


def test_a_spread_is_median_and_range():
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0)
    assert f"{Spread.of([3.0, 1.0, 1.5]):.1f}" == "1.5 (1.0-3.0)"
    assert mean_and_spread([1.0, 2.0]) == "1.50 ± 0.71"
    assert mean_and_spread([2.0], 1, "+") == "+2.0"


def test_what_fails_in_a_process_of_its_own_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)'this' failed.*No module named"):
        alone("cl_merge.benchmarks.no_such_thing", "this")


def test_runs_of_a_suite_are_grouped_by_their_setting(tmp_path):
    runs = [tmp_path / name for name in ("a-2/seed0/run", "b-2/seed0/run", "a-2/seed1/run")]
    found = by_setting(runs, lambda run: run.parts[-2])
    assert found == {"a-2": ["seed0", "seed1"], "b-2": ["seed0"]}


def test_task_vectors_come_in_the_order_of_the_tasks(tmp_path):
    folder = tmp_path / "task_vectors" / "sequential"
    folder.mkdir(parents=True)
    for task in (10, 0, 2):
        TaskVector({"w": torch.full((1,), float(task))}).save(folder / f"task{task}.safetensors")
    assert [float(vector["w"]) for vector in task_vectors(tmp_path)] == [0, 2, 10]
    with pytest.raises(InputError, match="no task vectors in .*independent"):
        task_vectors(tmp_path, "independent")
