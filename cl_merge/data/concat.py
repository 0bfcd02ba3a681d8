"""Several data sets as one, for streams whose tasks are data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from cl_merge.data.images import ImageTable
from cl_merge.data.sources import without_bars
from cl_merge.data.tables import indices_of, splits_read, two_splits, with_unions
from cl_merge.data.tasks import Indices
from cl_merge.errors import InputError, listing

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class NamedSplits:
    """A data set to join with others; its name is that of its task. Options as in `TaskStream`."""

    name: str
    splits: Mapping[str, datasets.Dataset]
    image: str = "image"
    label: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    test_fraction: float | None = None
    split_seed: int = 0

    def divided(
        self, splits: Mapping[str, datasets.Dataset]
    ) -> tuple[datasets.Dataset, datasets.Dataset]:
        """The images to train on and those to test on, of its splits or of a copy of them."""
        return two_splits(
            splits, self.train_split, self.test_split, self.test_fraction, self.split_seed
        )


def concat(data: Sequence[NamedSplits]) -> tuple[dict[str, datasets.Dataset], list[list[str]]]:
    """Put data sets one after another, each with classes of its own.

    The images stay where they are, on disk or in memory: none is decoded, and none copied but those
    of a split that was itself selected from another.

    Returns:
        Splits ``train`` and ``test`` with columns ``image``, ``label`` (a `ClassLabel` with names
        ``DATA SET: CLASS``) and ``source`` (a `ClassLabel` with the names of the data sets); and
        the names of each data set's own classes, in the order of the labels.

    Example::

        data = [NamedSplits("digits", digits()), NamedSplits("photos", read_images("/photos"))]
        splits, _ = concat(data)
        stream = TaskStream(splits, scenario="source", domain="source")
    """
    import datasets

    repeated = [name for name, count in Counter(d.name for d in data).items() if count > 1]
    if repeated or not data:
        raise InputError(
            f"data sets to put together: {listing(d.name for d in data)}; expected at least one, "
            "and each once"
        )
    data = [_with_unions(own) for own in data]
    labels, names = zip(*map(_labels, data), strict=True)
    classes = [f"{d.name}: {c}" for d, own in zip(data, names, strict=True) for c in own]
    label = datasets.ClassLabel(names=classes)
    source = datasets.ClassLabel(names=[d.name for d in data])
    features = datasets.Features({"label": label, "source": source})
    first_label = [0, *accumulate(map(len, names))]
    parts = []
    for index, own in enumerate(data):
        # Columns first, then the division: to add one to a part would copy its images.
        labelled = {}
        for split, found in labels[index].items():
            values = {"label": found + first_label[index], "source": np.full(len(found), index)}
            columns = datasets.Dataset.from_dict(values, features)
            labelled[split] = _beside_images(own.splits[split], own.image, columns)
        parts.append(own.divided(labelled))
    train, test = (datasets.concatenate_datasets(list(own)) for own in zip(*parts, strict=True))
    return {"train": train, "test": test}, list(names)


def _with_unions(data: NamedSplits) -> NamedSplits:
    wanted = splits_read(data.train_split, data.test_split, data.test_fraction)
    return replace(data, splits=with_unions(data.splits, wanted))


def _labels(data: NamedSplits) -> tuple[dict[str, Indices], list[str]]:
    """The labels of each split that is used, before any is divided, and the classes' names."""
    test_split = data.train_split if data.test_fraction else data.test_split
    try:
        data.divided(data.splits)  # for its errors
        first, second = (
            ImageTable(data.splits[split], data.image, data.label, where=split)
            for split in (data.train_split, test_split)
        )
        train, test, names = indices_of(first, second, "label")
    except InputError as error:
        raise InputError(f"data set '{data.name}': {error}") from error
    return {test_split: test, data.train_split: train}, names


def _beside_images(
    rows: datasets.Dataset, image: str, columns: datasets.Dataset
) -> datasets.Dataset:
    """Keep the images alone, and put other columns beside them."""
    import datasets

    images = rows.select_columns([image])
    images = images if image == "image" else images.rename_column(image, "image")
    # The same feature for all, without a look at the images.
    images = images.cast_column("image", datasets.Image())
    # Of rows that were selected from others, `datasets` makes a copy here, with a progress bar.
    with without_bars():
        return datasets.concatenate_datasets([images, columns], axis=1)
