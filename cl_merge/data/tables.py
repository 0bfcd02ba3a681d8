"""From the splits of a data set to two tables whose labels and domains are integers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from cl_merge.data.images import ImageTable
from cl_merge.data.sources import without_bars
from cl_merge.data.tasks import Indices
from cl_merge.errors import InputError, listing, unknown_name

if TYPE_CHECKING:
    import datasets


def splits_read(train: str, test: str, test_fraction: float | None) -> list[str]:
    """The names of the splits that a stream reads, which may be unions.

    Example:
        >>> splits_read("train+validation", "test", None)
        ['train+validation', 'test']
    """
    return [train] if test_fraction is not None else [train, test]


def parts_of(splits: Iterable[str]) -> list[str]:
    """The splits that unions are made of, each once.

    Example:
        >>> parts_of(["train+validation", "test"])
        ['train', 'validation', 'test']
    """
    return list(dict.fromkeys(part for split in splits for part in split.split("+")))


def with_unions(
    splits: Mapping[str, datasets.Dataset], wanted: Iterable[str]
) -> Mapping[str, datasets.Dataset]:
    """Add the unions of splits that are wanted, such as ``train+validation``; copies no image."""
    import datasets

    found = dict(splits)
    for name in wanted:
        parts = name.split("+")
        if name not in found and len(parts) > 1 and set(parts) <= set(splits):
            try:
                found[name] = datasets.concatenate_datasets([splits[part] for part in parts])
            except ValueError as error:
                raise InputError(f"split '{name}': its parts differ in their columns") from error
    return found


def two_splits(
    splits: Mapping[str, datasets.Dataset],
    train: str,
    test: str,
    test_fraction: float | None,
    seed: int,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Choose the images to train on and those to test on: two splits, or two parts of the first."""
    if train not in splits:
        raise InputError(
            f"the data set has no split '{train}'; it has {listing(splits)}: name the one to "
            "train on with train_split=..."
        )
    if test_fraction is not None:
        if not 0 < test_fraction < 1:
            raise InputError(f"test_fraction={test_fraction}; expected more than 0, below 1")
        try:
            parts = splits[train].train_test_split(test_fraction, seed=seed)
        except ValueError as error:
            raise InputError(
                f"test_fraction={test_fraction} of {len(splits[train])} images leaves "
                "none to train on; give a smaller share"
            ) from error
        return parts["train"], parts["test"]
    if test not in splits:
        raise InputError(
            f"the data set has no split '{test}'; it has {listing(splits)}: name the one to test "
            "on with test_split=..., or hold images out with test_fraction=0.2"
        )
    return splits[train], splits[test]


def indices_of(
    train: ImageTable, test: ImageTable, kind: str
) -> tuple[Indices, Indices, list[str]]:
    """Read ``"label"`` or ``"domain"`` of both splits, int64 [N] and [M], and the names of each.

    The names are those of a `ClassLabel`; of strings, the sorted strings; of numbers, the numbers.
    """
    names = train.names(kind)
    if names is None:
        found = train.values(kind)
        numbers = isinstance(found, np.ndarray)
        names = list(map(str, range(int(max(found)) + 1))) if numbers else sorted(set(found))
    return _indices(train, kind, names), _indices(test, kind, names), names


def with_domains(rows: datasets.Dataset, image: str, pattern: str) -> datasets.Dataset:
    """Add a column of domains that are read off the names of the images' files.

    Args:
        rows: A split.
        image: The column with the images.
        pattern: A regular expression that matches the beginning of a file's name, without its
            folder; its first group is the domain, as in ``([a-z]+)_[0-9]+`` for ``art_12.jpg``.

    Returns:
        The split with a column ``domain``. No image is read.

    Raises:
        InputError: If the pattern has no group, or an image has no file name that matches.
    """
    import datasets

    expression, domains = domain_expression(pattern), []
    if image not in rows.column_names:
        raise unknown_name("column of images", image, rows.column_names)
    files = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    for row, path in enumerate(files.flatten()[f"{image}.path"]):
        domains.append(file_domain(expression, path, f"row {row}, column '{image}'"))
    with without_bars():
        return rows.add_column("domain", domains)


def domain_expression(pattern: str) -> re.Pattern[str]:
    """Compile the pattern of `with_domains`; `InputError` if it cannot say a domain."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"domain_pattern={pattern}: no regular expression ({error})") from error
    if expression.groups < 1:
        raise InputError(
            f"domain_pattern={pattern} has no group; put the part that is the domain in "
            "parentheses, as in ([a-z]+)_[0-9]+"
        )
    return expression


def file_domain(expression: re.Pattern[str], path: str | None, where: str) -> str:
    """Read the domain off the name of an image's file."""
    found = expression.match(re.split(r"[/\\]", path or "")[-1])
    if found is None:
        file = f"the file name {path}" if path else "no file name"
        raise InputError(
            f"{where}, has {file}, which says no domain: domain_pattern={expression.pattern} does "
            "not match; use a copy that keeps the names of its files, or name a column of domains "
            "with domain=..."
        )
    return found[1]


def _indices(table: ImageTable, column: str, names: list[str]) -> Indices:
    """Read labels or domains as indices into `names`, and check that each has a name."""
    values, own_names = table.values(column), table.names(column)
    if isinstance(values, np.ndarray):
        check_range(values, len(own_names or names), f"the {table.where} split", column)
        if own_names in (None, names):
            return values
        # Two splits may number the same names differently; the names decide.
        values = [own_names[value] for value in values]
    position = {name: index for index, name in enumerate(names)}
    unknown = sorted(set(values) - set(position))
    if unknown:
        raise InputError(
            f"the {table.where} split has {column}s that are not in the training split: "
            f"{listing(unknown)}"
        )
    return np.asarray([position[value] for value in values], dtype=np.int64)


def check_range(values: Indices, number: int, owner: str, kind: str = "label") -> None:
    """Make sure that labels, or domains, are from 0 to below a number of classes."""
    wrong = [str(value) for value in np.unique(values) if not 0 <= value < number]
    if wrong:
        raise InputError(
            f"{owner} has {kind}s outside the head: {listing(wrong)}; expected 0 to {number - 1}"
        )
