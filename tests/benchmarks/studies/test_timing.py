"""Clocks, and the order in which alternatives take turns."""

import time

import pytest

from cl_merge.benchmarks.studies.timing import Spread, Stopwatch, alone, alternated


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


def test_what_fails_in_a_process_of_its_own_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)'this' failed.*No module named"):
        alone("cl_merge.benchmarks.no_such_thing", "this")
