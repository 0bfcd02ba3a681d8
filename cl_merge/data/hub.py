"""Data sets of the Hugging Face hub: what it says of them, and of their files only those needed."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cl_merge.data.hub_cache import cached_commit, read_cached
from cl_merge.errors import InputError, causes, listing, was_interrupted

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

log = logging.getLogger(__name__)

SPARE = 1 << 30
"""Bytes that are to be left on a disk: a run writes there, too."""

_TRIES, _LONGEST_WAIT = 6, 300.0  # of a hub that says it is busy, seconds between them


class HubError(InputError):
    """The hub does not give what it was asked for; the message says why."""


@dataclass(frozen=True)
class HubData:
    """What the hub says of a data set before any image is downloaded.

    Attributes:
        hub_id: ``OWNER/NAME``.
        configuration: The part of the repository that is meant, by the name the hub has for it.
        commit: The commit that all of this holds for.
        files: By split, the paths of its files in the repository.
        features: The columns and their types; None if only the files say.
        rows: By split, how many images it has, as far as the hub says.
        arrow_bytes: By split, how many bytes it takes once prepared, as far as the hub says.
        builder: What reads it.
    """

    hub_id: str
    configuration: str
    commit: str
    files: Mapping[str, Sequence[str]]
    features: datasets.Features | None
    rows: Mapping[str, int]
    arrow_bytes: Mapping[str, int]
    builder: datasets.DatasetBuilder

    def file_bytes(self, splits: Sequence[str]) -> dict[str, int]:
        """Ask for the sizes of the files of some splits, in bytes, by path."""
        from huggingface_hub import HfApi

        paths = [path for split in splits for path in self.files[split]]
        hub, commit = HfApi(), self.commit
        found = asked(
            lambda: list(
                hub.get_paths_info(self.hub_id, paths, repo_type="dataset", revision=commit)
            )
        )
        return {file.path: file.size for file in found if hasattr(file, "size")}

    def with_footers(self) -> HubData:
        """Read from its parquet files, but for the images, what the hub does not say."""
        import datasets
        import pyarrow.parquet
        from huggingface_hub import HfFileSystem

        rows, features = dict(self.rows), self.features
        for split, paths in self.files.items():
            unknown = split not in rows or features is None
            if not unknown or not all(path.endswith(".parquet") for path in paths):
                continue
            number = 0
            for path in paths:
                with HfFileSystem().open(f"datasets/{self.hub_id}@{self.commit}/{path}") as file:
                    footer = pyarrow.parquet.ParquetFile(file)
                    number += footer.metadata.num_rows
                    schema = footer.schema_arrow
            rows.setdefault(split, number)
            features = features or datasets.Features.from_arrow_schema(schema)
        return replace(self, rows=rows, features=features)

    def first_row(self, split: str) -> Mapping[str, Any]:
        """Read the first row of a split, without the rest; its images are not decoded."""
        import datasets

        rows: Any = self.builder.as_streaming_dataset(split=split)
        for column, kind in dict(rows.features or {}).items():
            if isinstance(kind, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        row: Mapping[str, Any] = asked(lambda: next(iter(rows)))
        return row

    def check_splits(self, splits: Sequence[str]) -> None:
        """Make sure that there are these splits, before anything is downloaded."""
        for split in splits:
            if split not in self.files:
                raise InputError(
                    f"data set '{self.hub_id}' has no split '{split}'; it has "
                    f"{listing(self.files)}: choose with train_split=... and test_split=..., or "
                    "hold images out with test_fraction=0.2"
                )

    def needs(self, splits: Sequence[str]) -> Needs:
        """Find out what reading some splits will download and write."""
        from huggingface_hub import try_to_load_from_cache

        def is_here(path: str) -> bool:
            options = {"repo_type": "dataset", "revision": self.commit}
            return isinstance(try_to_load_from_cache(self.hub_id, path, **options), str)

        sizes = self.file_bytes(splits)
        written = sum(
            self.arrow_bytes.get(split) or sum(sizes.get(path, 0) for path in self.files[split])
            for split in splits
        )
        return Needs(sum(n for path, n in sizes.items() if not is_here(path)), written)


@dataclass(frozen=True)
class Needs:
    """How many bytes are to be downloaded, and how many more will be written beside them."""

    download: int
    written: int

    def __add__(self, other: Needs) -> Needs:
        return Needs(self.download + other.download, self.written + other.written)

    def __str__(self) -> str:
        return f"{size(self.download)} to download, {size(self.download + self.written)} of disk"

    def by_disk(self) -> Iterator[tuple[Path, int, int]]:
        """Each disk of the caches, with the bytes that will be written there and those free."""
        import datasets
        from huggingface_hub import constants

        wanted: dict[int, tuple[Path, int]] = {}
        for folder, number in (
            (constants.HF_HUB_CACHE, self.download),
            (datasets.config.HF_DATASETS_CACHE, self.written),
        ):
            path = existing(Path(folder))
            _, before = wanted.get(path.stat().st_dev, (path, 0))
            wanted[path.stat().st_dev] = path, before + number
        for path, number in wanted.values():
            yield path, number, shutil.disk_usage(path).free

    def check_disk(self, what: str) -> None:
        """Make sure that the disks of the caches have room."""
        for path, number, free in self.by_disk():
            if number and number + SPARE > free:
                raise InputError(
                    f"{what} needs {size(number)} at {path}, where {size(free)} are free; make "
                    "room, or set HF_HOME to a folder on a larger disk"
                )


def describe_hub(source: str, revision: str | None = None) -> HubData:
    """Ask the hub for what it says of a data set; downloads no image.

    Args:
        source: ``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION``.
        revision: Which commit, by its id or the first seven or more of its digits; the newest if
            None.

    Raises:
        HubError: If it cannot be had; says why.
    """
    import datasets
    from huggingface_hub import HfApi

    hub_id, _, configuration = source.partition(":")
    try:
        # Alone in that it is asked but once if there is no network.
        hub = HfApi()
        commit = _long(hub_id, revision)
        info = asked(lambda: hub.dataset_info(hub_id, revision=commit, timeout=20))
        builder = asked(
            lambda: datasets.load_dataset_builder(
                hub_id, configuration or None, revision=str(info.sha)
            )
        )
    # The clients raise errors of a dozen kinds, with those of several packages below them.
    except Exception as error:
        raise HubError(explained(error, revision)) from error
    files = builder.config.data_files
    if not files or builder.hash != info.sha:
        # What `datasets` falls back to without a word: whatever it finds in its cache.
        raise HubError(f"the hub has stopped answering for commit {info.sha}")
    splits = dict(builder.info.splits or {})
    return HubData(
        hub_id,
        builder.config.name,
        str(info.sha),
        {str(split): [_path(url) for url in urls] for split, urls in files.items()},
        builder.info.features,
        {name: split.num_examples for name, split in splits.items() if split.num_examples},
        {name: split.num_bytes for name, split in splits.items() if split.num_bytes},
        builder,
    )


def read_hub(
    source: str, revision: str | None = None, splits: Sequence[str] | None = None
) -> Mapping[str, datasets.Dataset]:
    """Read splits of a data set of the hub, from the cache where it has them.

    A commit that the cache has is read without asking the hub. Otherwise only the files of these
    splits are downloaded, after a look at the disk; files that are complete are not downloaded
    again.

    Args:
        source: As for `describe_hub`.
        revision: Which commit; the newest if None, or that of the cache if the hub does not answer.
        splits: Which splits; all if None.

    Raises:
        HubError: If it cannot be had; says why.
        InputError: If it has no such split, or the disk has no room.
    """
    import datasets

    if revision is not None and (found := read_cached(source, revision, splits)) is not None:
        return found
    try:
        described = describe_hub(source, revision)
    except HubError as error:
        newest = read_cached(source, None, splits) if revision is None else None
        if newest is None:
            raise
        log.warning("%s: %s; it is read as it is in the cache", source, error)
        return newest
    chosen = list(described.files) if splits is None else list(splits)
    described.check_splits(chosen)
    needs = described.needs(chosen)
    log.info("%s, %s: %s", source, " and ".join(chosen), needs)
    needs.check_disk(f"data set '{source}'")
    some: dict[str, Any] = {}
    if splits is not None:
        files = {split: list(described.files[split]) for split in chosen}
        # Older versions of `datasets` miss the splits that are left out, if they may check.
        some = {"data_files": files, "features": described.features}
        some["verification_mode"] = "no_checks"
    options = {"revision": described.commit, **some}
    try:
        loaded: Mapping[str, datasets.Dataset] = asked(
            lambda: datasets.load_dataset(described.hub_id, described.configuration, **options)
        )
    except Exception as error:  # as above
        raise HubError(explained(error, revision)) from error
    if cached_commit(loaded) not in (described.commit, None):
        raise HubError(f"the hub has stopped answering for commit {described.commit}")
    for split, images in loaded.items():
        told = described.rows.get(split, len(images))
        if told != len(images):
            message = "%s: split '%s' has %d images, but the hub says %d"
            log.warning(message, source, split, len(images), told)
    return loaded


def explained(error: BaseException, revision: str | None = None) -> str:
    """Say in one line why the hub does not give what it was asked for."""
    for cause in causes(error):
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        for kind, words in _REASONS.items():
            if kind in kinds:
                return words.format(revision)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# By the names of the clients' errors, which have moved between their modules; the first counts.
_REASONS = {
    "GatedRepoError": "it is gated: accept its terms on its page, and log in with 'hf auth login'",
    "RevisionNotFoundError": "it has no commit {}",
    "RepositoryNotFoundError": "the hub has nothing of this name, or it is private",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "ConnectError": "the hub cannot be reached",
    "ConnectTimeout": "the hub cannot be reached",
    "ConnectionError": "the hub cannot be reached",
}


def asked(question: Callable[[], T]) -> T:
    """Ask the hub, again where it says that it is busy, or where the connection broke."""
    for left in reversed(range(_TRIES)):
        try:
            return question()
        except Exception as error:
            wait = _wait_after(error)
            if wait is None or not left:
                raise
            why, seconds = wait
            log.info("%s: it is asked again in %.0f s", why, seconds)
            time.sleep(seconds)
    raise AssertionError


def size(number: int) -> str:
    """Write a number of bytes.

    Example:
        >>> size(5_970_000_000), size(2_300_000), size(900)
        ('6.0 GB', '2.3 MB', '0.9 kB')
    """
    unit, name = next((10**n, name) for n, name in _UNITS if number >= 10**n or n == 3)
    return f"{number / unit:.1f} {name}"


_UNITS = ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB"))


def existing(path: Path) -> Path:
    """The nearest folder above a path, or itself, that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _long(hub_id: str, revision: str | None) -> str | None:
    """The whole id of a commit of which the first digits are given: the hub takes no other."""
    if revision is None or not re.fullmatch("[0-9a-f]{7,39}", revision):
        return revision
    from huggingface_hub import HfApi

    commits = HfApi().list_repo_commits(hub_id, repo_type="dataset")
    found = [one.commit_id for one in commits if one.commit_id.startswith(revision)]
    return found[0] if len(found) == 1 else revision


def _path(url: str) -> str:
    """The path within its repository of ``hf://datasets/OWNER/NAME@COMMIT/PATH``."""
    return re.sub(r"^hf://datasets/[^/]+/[^/]+?(@[^/]+)?/", "", str(url))


def _wait_after(error: BaseException) -> tuple[str, float] | None:
    """Why the hub is to be asked again, and after how many seconds; None if it is not."""
    if was_interrupted(error):
        return None
    for cause in causes(error):
        response: Any = getattr(cause, "response", None)
        if getattr(response, "status_code", None) == 429:
            told = str(response.headers.get("Retry-After", ""))
            seconds = float(told) if told.isdecimal() else 30.0
            return "the hub is busy", min(seconds, _LONGEST_WAIT)
        if type(cause).__name__ in _BROKEN:
            return "the connection to the hub broke", 5.0
    return None


# Of requests, of httpx, and of what is below them.
_BROKEN = ("ChunkedEncodingError", "RemoteProtocolError", "ReadError", "IncompleteRead")
