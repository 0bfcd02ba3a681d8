"""How a data set becomes a stream: the tasks, and the four ways to split; no image is decoded.

The splits take values of the N training and the M test images, int64 [N] and [M], which are indices
into names: labels, domains or sources (the data sets that were joined). The order is that of the
classes, domains or sources, see `resolve_order`. They raise `InputError` if a task would have no
training or no test image.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.seeds import derive_seed

Indices: TypeAlias = NDArray[np.int64]
Order: TypeAlias = str | int | Sequence[int] | Sequence[str]

SCENARIOS = ("class", "domain", "data", "source")


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Attributes:
        index: Position in the stream, from 0.
        name: What the task is called in tables: its classes, domain, data set or part.
        classes: Global labels of the task's classes in their order, which are also the rows of the
            classification head.
        class_names: The names of those classes.
        train: Rows of the training set that belong to the task, int64, ascending.
        test: Rows of the test set that belong to the task, int64, ascending.
        held_out: Rows of the training set that belong to the task and are not trained on, int64,
            ascending.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    train: Indices
    test: Indices
    held_out: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise InputError(
                f"task {self.index} ({self.name}) has no training image; use fewer tasks, or leave "
                "out what the training set does not show"
            )
        if len(self.test) == 0:
            raise InputError(
                f"task {self.index} ({self.name}) has no test image to tell how good a model is "
                "at it; use fewer tasks, or hold more images out with test_fraction=..."
            )


def parts(length: int, number: int) -> list[slice]:
    """Cut a sequence into consecutive parts of nearly equal length; together they cover it once.

    Part k is ``[floor(length / number * k), floor(length / number * (k + 1)))``, in integers: in
    floating point some pairs, 100 classes in 97 tasks for one, lose the last one.

    Example:
        >>> parts(7, 3)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    edges = [length * k // number for k in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def resolve_order(order: Order, names: Sequence[str], what: str) -> list[int]:
    """Turn an order given as a word, a seed or a list into a list of indices.

    Args:
        order: ``"natural"`` (as the data set lists them), a seed (a permutation drawn from it), or
            a list of indices or of names that holds each of them once.
        names: The names to order, ``names[i]`` belongs to index i.
        what: What the names stand for, for messages: ``"class"``, ``"domain"`` or ``"source"``.

    Raises:
        InputError: If a name is unknown or the list is not a permutation.

    Example:
        >>> resolve_order(["cat", "ant"], ["ant", "cat"], "class")
        [1, 0]
    """
    if isinstance(order, str):
        if order != "natural":
            raise unknown_name(f"{what} order", order, ["natural"])
        return list(range(len(names)))
    seed = as_integer(order)
    if seed is not None and seed >= 0:
        return [int(i) for i in np.random.default_rng(seed).permutation(len(names))]
    if not isinstance(order, Iterable):
        raise InputError(
            f"the {what} order is {order}; expected natural, a seed of 0 or more, or a list of "
            f"every {what}"
        )
    indices = [_index_of(item, names, what) for item in order]
    counts = Counter(indices)
    missing = [name for index, name in enumerate(names) if counts[index] == 0]
    repeated = [name for index, name in enumerate(names) if counts[index] > 1]
    if missing or repeated:
        raise InputError(
            f"the {what} order must hold each {what} once, {len(names)} in all; "
            f"missing: {listing(missing)}; repeated: {listing(repeated)}"
        )
    return indices


def split_by_class(
    train_labels: Indices,
    test_labels: Indices,
    class_names: Sequence[str],
    *,
    tasks: int,
    order: Order = "natural",
) -> list[Task]:
    """Class-incremental: every task brings classes that no other task has.

    Of C classes task k of T, at most C, has ``order[floor(C/T*k) : floor(C/T*(k+1))]``.
    """
    if tasks > len(class_names):
        raise InputError(
            f"tasks={tasks} is more than the {len(class_names)} classes of the data set; "
            "every task needs a class of its own"
        )
    ordered = resolve_order(order, class_names, "class")
    classes = [ordered[part] for part in parts(len(ordered), tasks)]
    names = [listing([class_names[c] for c in own]) for own in classes]
    task_of_class = np.zeros(len(class_names), dtype=np.int64)
    for index, own in enumerate(classes):
        task_of_class[own] = index
    rows = task_of_class[train_labels], task_of_class[test_labels]
    return _tasks(names, classes, class_names, *rows)


def split_by_domain(
    train_domains: Indices,
    test_domains: Indices,
    class_names: Sequence[str],
    domain_names: Sequence[str],
    *,
    order: Order = "natural",
) -> list[Task]:
    """Domain-incremental: every domain is a task and brings all classes."""
    ordered = resolve_order(order, domain_names, "domain")
    names = [domain_names[domain] for domain in ordered]
    classes = [range(len(class_names))] * len(ordered)
    position = np.argsort(ordered)  # of each domain in the order
    return _tasks(names, classes, class_names, position[train_domains], position[test_domains])


def split_by_source(
    sources: tuple[Indices, Indices],
    labels: tuple[Indices, Indices],
    class_names: Sequence[str],
    source_names: Sequence[str],
    *,
    order: Order = "natural",
) -> list[Task]:
    """Split joined data sets into what they were: each is a task, with the classes that it shows.

    Sources and labels are pairs, of the training and of the test images. `InputError` if data sets
    share a class.
    """
    classes = [
        sorted({int(c) for s, y in zip(sources, labels, strict=True) for c in np.unique(y[s == k])})
        for k in range(len(source_names))
    ]
    counts = Counter(itertools.chain.from_iterable(classes))
    shared = [class_names[c] for c, count in counts.items() if count > 1]
    if shared:
        raise InputError(
            f"these classes are in several data sets: {listing(shared)}; scenario=source "
            "needs classes of its own for each, scenario=domain has all classes in all"
        )
    ordered = resolve_order(order, source_names, "source")
    names = [source_names[source] for source in ordered]
    position = np.argsort(ordered)  # of each data set in the order
    rows = (position[found] for found in sources)
    return _tasks(names, [classes[source] for source in ordered], class_names, *rows)


def split_by_data(
    train_size: int, test_size: int, class_names: Sequence[str], *, tasks: int, seed: int
) -> list[Task]:
    """Data-incremental: every task brings a random part of the images, of all classes.

    The test images are dealt out in the same way, so that each of them counts for one task.
    """
    random = np.random.default_rng(seed)
    dealt = []
    for size in (train_size, test_size):
        shuffled, found = random.permutation(size), np.zeros(size, dtype=np.int64)
        for index, part in enumerate(parts(size, tasks)):
            found[shuffled[part]] = index
        dealt.append(found)
    names = [f"part {index + 1}" for index in range(tasks)]
    return _tasks(names, [range(len(class_names))] * tasks, class_names, *dealt)


def joint_task(tasks: Sequence[Task], class_names: Sequence[str]) -> Task:
    """All images and classes of some tasks in a single one, each once."""
    classes = tuple(dict.fromkeys(label for task in tasks for label in task.classes))
    return Task(
        index=0,
        name="joint",
        classes=classes,
        class_names=tuple(class_names[label] for label in classes),
        train=np.unique(np.concatenate([task.train for task in tasks])),
        test=np.unique(np.concatenate([task.test for task in tasks])),
        held_out=np.unique(np.concatenate([task.held_out for task in tasks])),
    )


def limited_tasks(tasks: Sequence[Task], labels: Indices, limit: int, seed: int) -> list[Task]:
    """Train on at most `limit` images of each class, chosen at random."""
    if limit < 1:
        raise InputError(f"images_per_class={limit}; expected 1 or more")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    # Class by class, those of each as they were shuffled.
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
    place = np.arange(len(rows)) - np.searchsorted(labels[rows], labels[rows])
    kept = np.zeros(len(labels), dtype=np.bool_)
    kept[rows[place < limit]] = True
    return [replace(task, train=task.train[kept[task.train]]) for task in tasks]


def held_out_tasks(tasks: Sequence[Task], labels: Indices, share: float, seed: int) -> list[Task]:
    """Hold a share of each task's training images out, of each class."""
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not (number and 0 <= share < 1):
        raise InputError(f"held_out={share}; expected 0 or more, below 1")
    found = []
    for task in tasks:
        chosen = hold_out(labels[task.train], share, derive_seed("held out", seed, task.index))
        found.append(replace(task, train=task.train[~chosen], held_out=task.train[chosen]))
    return found


def hold_out(labels: Indices, share: float, seed: int) -> NDArray[np.bool_]:
    """Choose a share of the images of each class, at random.

    Args:
        labels: Labels, int64 [N].
        share: Which share, 0 to 1; at least one image of a class with two or more, but not all.
        seed: Which images.

    Returns:
        Whether each image is chosen, bool [N].

    Example:
        >>> chosen = hold_out(np.array([0, 0, 0, 0, 1, 1, 2]), 0.5, seed=0)
        >>> int(chosen[:4].sum()), int(chosen[4:6].sum()), int(chosen[6])
        (2, 1, 0)
    """
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        chosen[rows[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    return chosen


def _tasks(
    names: Sequence[str],
    classes: Sequence[Sequence[int]],
    class_names: Sequence[str],
    train: Indices,
    test: Indices,
) -> list[Task]:
    """Make tasks of their names, classes, and which of them each training and test image is for."""
    tasks = []
    for index, (name, own) in enumerate(zip(names, classes, strict=True)):
        rows = np.flatnonzero(train == index), np.flatnonzero(test == index)
        tasks.append(Task(index, name, tuple(own), tuple(class_names[c] for c in own), *rows))
    return tasks


def _index_of(item: int | str, names: Sequence[str], what: str) -> int:
    if isinstance(item, str):
        if item not in names:
            raise unknown_name(what, item, names)
        return list(names).index(item)
    index = as_integer(item)
    if index is None or not 0 <= index < len(names):
        raise InputError(
            f"the {what} order names index {item}, but they run from 0 to {len(names) - 1}"
        )
    return index


def as_integer(value: Any) -> int | None:
    """Read an integer of Python, numpy or torch; None for anything else, booleans among them."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
