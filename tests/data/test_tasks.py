"""The four ways to split a data set into tasks."""

import itertools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_merge.data.tasks import (
    Task,
    hold_out,
    limited_tasks,
    parts,
    resolve_order,
    split_by_class,
    split_by_data,
    split_by_domain,
    split_by_source,
)
from cl_merge.errors import InputError

NAMES = ["ant", "bee", "cat", "dog", "emu"]
LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4])


@given(length=st.integers(1, 300), number=st.integers(1, 300))
def test_parts_cover_everything_once_and_differ_by_at_most_one(length, number):
    found = [list(range(length))[part] for part in parts(length, number)]
    assert list(itertools.chain(*found)) == list(range(length))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("classes", [100, 196, 200, 345])
@pytest.mark.parametrize("tasks", [5, 10, 20, 50])
def test_parts_are_the_published_slices(classes, tasks):
    step = classes / tasks
    published = [slice(math.floor(step * k), math.floor(step * (k + 1))) for k in range(tasks)]
    assert parts(classes, tasks) == published


def test_parts_keep_the_class_that_floating_point_would_lose():
    assert math.floor(100 / 97 * 97) == 99
    assert parts(100, 97)[-1].stop == 100


def test_classes_are_disjoint_and_labels_stay_global():
    tasks = split_by_class(LABELS, LABELS[:5], NAMES, tasks=2, order=[4, 0, 3, 1, 2])
    assert [task.classes for task in tasks] == [(4, 0), (3, 1, 2)]
    assert tasks[0].class_names == ("emu", "ant")
    assert set(LABELS[tasks[0].train]) == {0, 4}
    assert sorted(np.concatenate([task.train for task in tasks])) == list(range(len(LABELS)))
    assert sorted(np.concatenate([task.test for task in tasks])) == list(range(5))


def test_order_is_a_list_a_seed_or_natural():
    assert resolve_order("natural", NAMES, "class") == [0, 1, 2, 3, 4]
    assert resolve_order(["emu", "dog", "cat", "bee", "ant"], NAMES, "class") == [4, 3, 2, 1, 0]
    assert sorted(resolve_order(7, NAMES, "class")) == [0, 1, 2, 3, 4]
    assert resolve_order(7, NAMES, "class") == resolve_order(7, NAMES, "class")
    assert resolve_order(7, NAMES, "class") != resolve_order(8, NAMES, "class")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("random", "unknown class order 'random'. Known: natural"),
        (["ant", "be"], "unknown class 'be'; did you mean 'bee'? Known: ant, bee, cat, dog, emu"),
        ([0, 1, 2, 3, 5], "the class order names index 5, but they run from 0 to 4"),
        (
            [0, 1, 2, 3, 3],
            "the class order must hold each class once, 5 in all; missing: emu; repeated: dog",
        ),
    ],
)
def test_a_wrong_order_is_named(order, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        resolve_order(order, NAMES, "class")


def test_more_tasks_than_classes_is_an_error():
    message = (
        "tasks=6 is more than the 5 classes of the data set; every task needs a class of its own"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        split_by_class(LABELS, LABELS, NAMES, tasks=6)


def test_a_task_without_training_images_is_an_error():
    message = (
        "task 2 (cat) has no training image; use fewer tasks, or leave out what the training set "
        "does not show"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        split_by_class(LABELS[LABELS != 2], LABELS, NAMES, tasks=5)


def test_a_task_without_test_images_is_an_error():
    message = (
        "task 2 (cat) has no test image to tell how good a model is at it; use fewer tasks, or hold "
        "more images out with test_fraction=..."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        split_by_class(LABELS, LABELS[LABELS != 2], NAMES, tasks=5)


def test_each_domain_is_a_task_with_all_classes():
    domains = np.array([0, 1, 1, 0, 2])
    tasks = split_by_domain(
        domains, domains, NAMES, ["art", "photo", "sketch"], order=["sketch", "art", "photo"]
    )
    assert [task.name for task in tasks] == ["sketch", "art", "photo"]
    assert [task.train.tolist() for task in tasks] == [[4], [0, 3], [1, 2]]
    assert all(task.classes == (0, 1, 2, 3, 4) for task in tasks)


def test_data_parts_are_random_disjoint_and_reproducible():
    first = split_by_data(103, 20, NAMES, tasks=4, seed=1)
    again = split_by_data(103, 20, NAMES, tasks=4, seed=1)
    other = split_by_data(103, 20, NAMES, tasks=4, seed=2)
    assert sorted(np.concatenate([task.train for task in first])) == list(range(103))
    assert sorted(np.concatenate([task.test for task in first])) == list(range(20))
    assert all((a.train == b.train).all() for a, b in zip(first, again, strict=True))
    assert any(a.train.tolist() != b.train.tolist() for a, b in zip(first, other, strict=True))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 10), st.integers(0, 9))
def test_the_limit_keeps_exactly_so_many_of_each_class(labels, limit, seed):
    labels, rows = np.array(labels), np.arange(len(labels))
    [limited] = limited_tasks([Task(0, "all", (), (), rows, rows)], labels, limit, seed)
    kept = limited.train
    for label in set(labels.tolist()):
        assert (labels[kept] == label).sum() == min(limit, (labels == label).sum())
    assert (np.diff(kept) > 0).all()
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    first = [shuffled[labels[shuffled] == label][:limit] for label in np.unique(labels)]
    assert sorted(np.concatenate(first)) == kept.tolist()


def test_the_limit_of_a_million_images_takes_well_under_two_seconds():
    labels = np.arange(1_000_000) % 1000
    rows = [np.arange(start, start + 10_000) for start in range(0, 1_000_000, 10_000)]
    tasks = [Task(index, "part", (), (), own, own) for index, own in enumerate(rows)]
    started = time.process_time()
    limited_tasks(tasks, labels, 500, seed=0)
    assert time.process_time() - started < 2


def test_the_published_orders_are_permutations(shared):
    orders = json.loads(Path(shared / "paper" / "orders.json").read_text())["class_orders"]
    for order in orders.values():
        names = [str(i) for i in range(len(order))]
        assert resolve_order(order, names, "class") == order


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 9),
)
def test_of_each_class_a_share_is_held_out_and_never_all(labels, share, seed):
    labels = np.asarray(labels)
    chosen = hold_out(labels, share, seed)
    assert np.array_equal(chosen, hold_out(labels, share, seed))
    for label in np.unique(labels):
        images = int((labels == label).sum())
        expected = min(max(round(share * images), 1), images - 1)
        assert int(chosen[labels == label].sum()) == expected


def test_every_source_is_a_task_with_the_classes_that_its_images_show():
    sources = np.array([0, 1, 1, 0, 2, 1]), np.array([0, 1, 2])
    labels = np.array([0, 2, 1, 0, 4, 2]), np.array([0, 3, 4])
    tasks = split_by_source(sources, labels, NAMES, ["x", "y", "z"], order=["z", "x", "y"])
    assert [task.name for task in tasks] == ["z", "x", "y"]
    # Bee and cat are trained on, dog is only tested on: it is a class of that data set all the same.
    assert [task.classes for task in tasks] == [(4,), (0,), (1, 2, 3)]
    assert tasks[2].class_names == ("bee", "cat", "dog")
    assert [task.train.tolist() for task in tasks] == [[4], [0, 3], [1, 2, 5]]
    assert [task.test.tolist() for task in tasks] == [[2], [0], [1]]


def test_sources_that_share_a_class_are_refused():
    both = np.array([0, 1])
    with pytest.raises(InputError, match="^these classes are in several data sets: cat; "):
        split_by_source((both, both), (np.array([2, 2]), np.array([2, 3])), NAMES, ["x", "y"])


def test_a_source_without_training_images_is_refused():
    sources, labels = (np.array([0]), np.array([0, 1])), (np.array([0]), np.array([0, 1]))
    with pytest.raises(InputError, match=r"^task 1 \(y\) has no training image"):
        split_by_source(sources, labels, NAMES, ["x", "y"])
