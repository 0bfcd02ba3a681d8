"""Several data sets as one, for streams whose tasks are data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from cl_merge.data.sources import without_bars
from cl_merge.data.tables import labels_of, table_of, two_splits
from cl_merge.data.tasks import Indices
from cl_merge.errors import InputError, listing

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Member:
    """One of the data sets to join.

    Attributes:
        name: What it is called; the name of its task.
        splits: Its splits by name.
        image: The column with the images.
        label: The column with the labels.
        train_split: Name of the split to train on.
        test_split: Name of the split to test on.
        test_fraction: Share of the training split to test on instead.
        split_seed: Which share.
    """

    name: str
    splits: Mapping[str, datasets.Dataset]
    image: str = "image"
    label: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    test_fraction: float | None = None
    split_seed: int = 0


def join(members: Sequence[Member]) -> tuple[dict[str, datasets.Dataset], list[list[str]]]:
    """Put data sets one after another, each with classes of its own.

    The images stay where they are, on disk or in memory: none is decoded, and none copied but those
    of a split that was itself selected from another.

    Args:
        members: The data sets.

    Returns:
        Splits ``train`` and ``test`` with columns ``image``, ``label`` (a `ClassLabel` with names
        ``DATA SET: CLASS``) and ``source`` (a `ClassLabel` with the names of the data sets); and
        the names of each data set's own classes, in the order of the labels.

    Raises:
        InputError: If two data sets have the same name, or one cannot be read as told.

    Example::

        splits, _ = join([Member("digits", digits()), Member("photos", read_images("/photos"))])
        stream = TaskStream(splits, scenario="source", domain="source")
    """
    import datasets

    repeated = [name for name, count in Counter(m.name for m in members).items() if count > 1]
    if repeated or not members:
        raise InputError(
            f"data sets to join: {listing(m.name for m in members)}; expected at least one, and "
            "each once"
        )
    read = [_read(member) for member in members]
    names = [own for *_, own in read]
    features = {
        "label": datasets.ClassLabel(
            names=[f"{m.name}: {c}" for m, own in zip(members, names, strict=True) for c in own]
        ),
        "source": datasets.ClassLabel(names=[member.name for member in members]),
    }
    first_label = [0, *accumulate(len(own) for own in names)]
    parts: list[tuple[datasets.Dataset, datasets.Dataset]] = []
    for index, (member, (splits, labels, _)) in enumerate(zip(members, read, strict=True)):
        columns: dict[str, dict[str, Indices | int]] = {
            name: {"label": labels[name] + first_label[index], "source": index} for name in splits
        }
        slim = {
            name: _with_columns(rows, member.image, columns[name], features)
            for name, rows in splits.items()
        }
        parts.append(_two_splits(member, slim))
    train, test = zip(*parts, strict=True)
    return {
        "train": datasets.concatenate_datasets(list(train)),
        "test": datasets.concatenate_datasets(list(test)),
    }, names


def _read(
    member: Member,
) -> tuple[dict[str, datasets.Dataset], dict[str, Indices], list[str]]:
    """Read the labels of the splits that are used, before any is divided."""
    # Checks the names of the splits; the division itself comes when all columns are there, since
    # to add a column to one that is divided would copy its images.
    _two_splits(member, member.splits)
    used = [member.train_split, *([] if member.test_fraction else [member.test_split])]
    splits = {name: member.splits[name] for name in used}
    try:
        tables = [
            table_of(rows, member.image, member.label, where=split)
            for split, rows in splits.items()
        ]
        train, test, names = labels_of(tables[0], tables[-1])
    except InputError as error:
        raise InputError(f"data set '{member.name}': {error}") from error
    return splits, {used[-1]: test, used[0]: train}, names


def _two_splits(
    member: Member, splits: Mapping[str, datasets.Dataset]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    try:
        return two_splits(
            splits, member.train_split, member.test_split, member.test_fraction, member.split_seed
        )
    except InputError as error:
        raise InputError(f"data set '{member.name}': {error}") from error


def _with_columns(
    rows: datasets.Dataset,
    image: str,
    columns: Mapping[str, Indices | int],
    features: Mapping[str, datasets.ClassLabel],
) -> datasets.Dataset:
    """Keep the images alone, and add columns to them."""
    import datasets

    slim = rows.select_columns([image])
    slim = slim if image == "image" else slim.rename_column(image, "image")
    # The same feature for all, without a look at the images.
    slim = slim.cast_column("image", datasets.Image())
    # Of rows that were selected from others, `datasets` makes a copy here, with a progress bar.
    with without_bars():
        for name, values in columns.items():
            filled = np.broadcast_to(np.asarray(values, dtype=np.int64), len(rows))
            slim = slim.add_column(name, filled, feature=features[name])
    return slim
