"""Data sets of the hub as they lie in the cache of `datasets`, read without a network."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

_COMMIT = "[0-9a-f]{40}"


def read_cached(
    source: str, commit: str | None, splits: Sequence[str] | None
) -> Mapping[str, datasets.Dataset] | None:
    """Read a data set of the hub as `datasets` has left it in its cache, without a network.

    A folder there is complete: it gets its name when all is written.

    Args:
        source: As for `describe_hub`.
        commit: Which one, by its id or its first digits; the newest in the cache if None.
        splits: Which splits are needed; if None, those that it has.

    Returns:
        The splits; None if the cache does not have all of them.
    """
    import datasets

    hub_id, _, configuration = source.partition(":")
    owner, _, name = hub_id.rpartition("/")
    folder = f"{owner}___{datasets.naming.camelcase_to_snakecase(name)}"
    home = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / folder
    found = sorted(home.glob(f"*/*/{commit or ''}*/dataset_info.json"), key=os.path.getmtime)
    for file in reversed(found):
        if not re.fullmatch(_COMMIT, file.parent.name):
            continue  # one that is being written
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
    commits = {name for name in folders if re.fullmatch(_COMMIT, name)}
    return commits.pop() if len(commits) == 1 else None


def _default_configuration(hub_id: str, commit: str) -> str | None:
    """The configuration that a data set has if none is named, by its card in the cache."""
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    card = try_to_load_from_cache(hub_id, "README.md", repo_type="dataset", revision=commit)
    if not isinstance(card, str):
        return None
    found = DatasetCard.load(card).data.to_dict().get("configs") or [{"config_name": "default"}]
    chosen = [one for one in found if len(found) == 1 or one.get("default")]
    return str(chosen[0]["config_name"]) if chosen else None


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
