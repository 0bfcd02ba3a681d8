"""Data sets of the Hugging Face hub: what it says of them, and of their files only those needed."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cl_merge.errors import InputError, listing

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

log = logging.getLogger(__name__)

# What is to be left on a disk: a run writes there, too.
_SPARE = 1 << 30

_TRIES, _LONGEST_WAIT = 6, 300.0  # of a hub that says it is busy, seconds between them


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

    def __str__(self) -> str:
        return f"{size(self.download)} to download, {size(self.download + self.written)} of disk"

    def check_disk(self, what: str) -> None:
        """Make sure that the disks of the caches have room."""
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
            free = shutil.disk_usage(path).free
            if number and number + _SPARE > free:
                raise InputError(
                    f"{what} needs {size(number)} at {path}, where {size(free)} are free; make "
                    "room, or set HF_HOME to a folder on a larger disk"
                )


def describe_hub(source: str, revision: str | None = None) -> HubData:
    """Ask the hub for what it says of a data set; downloads no image.

    Args:
        source: ``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION``.
        revision: Which commit; the newest if None.

    Raises:
        Exception: Whatever its clients raise if it cannot be had.
    """
    import datasets

    hub_id, _, configuration = source.partition(":")
    builder = asked(
        lambda: datasets.load_dataset_builder(hub_id, configuration or None, revision=revision)
    )
    files = builder.config.data_files
    commit = str(builder.hash)
    if not files or not re.fullmatch("[0-9a-f]{40}", commit):
        # What `datasets` falls back to without a word: whatever it finds in its cache.
        raise ConnectionError(f"the hub does not answer, or not for commit {revision}")
    splits = dict(builder.info.splits or {})
    return HubData(
        hub_id,
        builder.config.name,
        commit,
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
    splits are downloaded, after a look at the disk; a download that was stopped goes on.

    Args:
        source: As for `describe_hub`.
        revision: Which commit; the newest if None.
        splits: Which splits; all if None.
    """
    import datasets

    if revision is not None and (found := read_cached(source, revision, splits)) is not None:
        return found
    commit = revision or hub_commit(source)
    if commit is None and (found := read_cached(source, None, splits)) is not None:
        log.warning("the hub does not answer; %s is read as it is in the cache", source)
        return found
    described = describe_hub(source, commit)
    chosen = list(described.files) if splits is None else list(splits)
    described.check_splits(chosen)
    needs = described.needs(chosen)
    log.info("%s, %s: %s", source, " and ".join(chosen), needs)
    needs.check_disk(f"data set '{source}'")
    some: dict[str, Any] = {}
    if splits is not None:
        files = {split: list(described.files[split]) for split in chosen}
        some = {"data_files": files, "features": described.features}
    options = {"revision": described.commit, **some}
    loaded: Mapping[str, datasets.Dataset] = asked(
        lambda: datasets.load_dataset(described.hub_id, described.configuration, **options)
    )
    if cached_commit(loaded) not in (described.commit, None):
        raise ConnectionError(f"the hub has stopped answering for commit {described.commit}")
    return loaded


def read_cached(
    source: str, commit: str | None, splits: Sequence[str] | None
) -> Mapping[str, datasets.Dataset] | None:
    """Read a data set of the hub as `datasets` has left it in its cache, without a network.

    A folder there is complete: it gets its name when all is written.

    Args:
        source: As for `describe_hub`.
        commit: Which one; the newest in the cache if None.
        splits: Which splits are needed; if None, those that it has.

    Returns:
        The splits; None if the cache does not have all of them.
    """
    import datasets

    hub_id, _, configuration = source.partition(":")
    owner, _, name = hub_id.rpartition("/")
    folder = f"{owner}___{datasets.naming.camelcase_to_snakecase(name)}"
    home = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / folder
    found = sorted(home.glob(f"*/*/{commit or '*'}/dataset_info.json"), key=os.path.getmtime)
    for file in reversed(found):
        info = datasets.DatasetInfo.from_directory(str(file.parent))
        has = dict(info.splits or {})
        # All splits of a configuration are there only where its folder has its plain name.
        plain = file.parts[-4] == info.config_name
        meant = configuration or _default_configuration(hub_id, file.parent.name)
        if info.config_name != meant:
            continue
        if not (plain if splits is None else set(splits) <= set(has)):
            continue
        read = {split: _read_split(file.parent, info, split) for split in splits or has}
        complete = {split: rows for split, rows in read.items() if rows is not None}
        if len(complete) == len(read):
            return complete
    return None


def cached_commit(splits: Mapping[str, datasets.Dataset]) -> str | None:
    """Find out which commit of a hub data set was read, from where its files lie in the cache."""
    folders = {Path(f["filename"]).parent.name for s in splits.values() for f in s.cache_files}
    commits = {name for name in folders if re.fullmatch("[0-9a-f]{40}", name)}
    return commits.pop() if len(commits) == 1 else None


def hub_commit(source: str) -> str | None:
    """Ask the hub which commit of a data set it would hand out now; None if it does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0], timeout=20).sha
    # No network, no such data set, no access: reading it says which, or finds it in the cache.
    except Exception:
        return None


def asked(question: Callable[[], T]) -> T:
    """Ask the hub, again where it says that it is busy, after as long as it says."""
    for left in reversed(range(_TRIES)):
        try:
            return question()
        except Exception as error:
            seconds = _told_to_wait(error)
            if seconds is None or not left:
                raise
            log.info("the hub is busy: it is asked again in %.0f s", seconds)
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


def _default_configuration(hub_id: str, commit: str) -> str | None:
    """The configuration that a data set has if none is named, by its card in the cache."""
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    card = try_to_load_from_cache(hub_id, "README.md", repo_type="dataset", revision=commit)
    if not isinstance(card, str):
        return None
    found = DatasetCard.load(card).data.to_dict().get("configs") or [{"config_name": "default"}]
    chosen = [one for one in found if len(found) == 1 or one.get("default")]
    return str(chosen[0]["config_name"]) if chosen else None


def _path(url: str) -> str:
    """The path within its repository of ``hf://datasets/OWNER/NAME@COMMIT/PATH``."""
    return re.sub(r"^hf://datasets/[^/]+/[^/]+?(@[^/]+)?/", "", str(url))


def _read_split(folder: Path, info: datasets.DatasetInfo, split: str) -> datasets.Dataset | None:
    """Read the Arrow files of a split in a folder of the cache; None if rows are missing."""
    import datasets

    pattern = re.compile(rf".+-{re.escape(split)}(-\d{{5}}-of-\d{{5}})?\.arrow")
    files = sorted(str(file) for file in folder.iterdir() if pattern.fullmatch(file.name))
    if not files:
        return None
    parts = [datasets.Dataset.from_file(file, info=info, split=split) for file in files]
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return rows if len(rows) == (info.splits or {})[split].num_examples else None


def _told_to_wait(error: BaseException) -> float | None:
    """How many seconds a busy hub says to wait; None for any other error."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        if getattr(response, "status_code", None) != 429:
            continue
        told = str(response.headers.get("Retry-After", ""))
        return min(float(told) if told.isdecimal() else 30.0, _LONGEST_WAIT)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
