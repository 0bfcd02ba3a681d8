"""Clocks, and the order in which alternatives take turns."""

import os
import sys
import time

import pytest
import torch

from cl_merge.benchmarks.studies.harness import (
    Stopwatch,
    alone,
    alternated,
    mean_and_spread,
    runs_by_setting,
    spread,
    task_vectors,
    timed,
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


def test_calls_of_a_method_are_timed_from_then_on():
    class Sleeper:
        def sleep(self, seconds):
            time.sleep(seconds)
            return seconds

    sleeper = Sleeper()
    sleeper.sleep(0.2)
    watch = timed(sleeper, "sleep")
    assert [sleeper.sleep(0.02), sleeper.sleep(0.01)] == [0.02, 0.01]
    assert 0.03 <= watch.wall < 0.2


def test_alternatives_take_turns_and_their_results_stay_in_order():
    order = []

    def work(name):
        order.append(name)
        return f"{name}{len(order)}"

    found = alternated({name: lambda name=name: work(name) for name in "abc"}, repeat=3)
    assert "".join(order) == "abccbaabc"
    assert found == {"a": ["a1", "a6", "a7"], "b": ["b2", "b5", "b8"], "c": ["c3", "c4", "c9"]}


def test_a_spread_is_median_and_range():
    assert spread([3.0, 1.0, 1.5, 2.5], 2) == "2.00 (1.00-3.00)"
    assert spread([3.0], 1) == "3.0"
    assert mean_and_spread([1.0, 2.0]) == "1.50 ± 0.71"
    assert mean_and_spread([2.0], 1, "+") == "+2.0"


def test_work_in_a_process_of_its_own_returns_what_it_found_or_says_why_it_failed(tmp_path):
    assert alone(os.getppid) == os.getpid()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        alone(os.stat, tmp_path / "nowhere")


def test_runs_of_a_suite_are_grouped_by_their_setting(tmp_path, monkeypatch):
    runs = [tmp_path / name for name in ("a-2/seed0/run", "b-2/seed0/run", "a-2/seed1/run")]
    monkeypatch.setattr(sys, "argv", ["study", *map(str, runs)])
    found = runs_by_setting("About.", lambda run: run.parts[-2])
    assert found == {"a-2": ["seed0", "seed1"], "b-2": ["seed0"]}


def test_task_vectors_come_in_the_order_of_the_tasks(tmp_path):
    folder = tmp_path / "task_vectors" / "sequential"
    folder.mkdir(parents=True)
    for task in (10, 0, 2):
        TaskVector({"w": torch.full((1,), float(task))}).save(folder / f"task{task}.safetensors")
    assert [float(vector["w"]) for vector in task_vectors(tmp_path)] == [0, 2, 10]
    with pytest.raises(InputError, match="no task vectors in .*independent"):
        task_vectors(tmp_path, "independent")
