"""The catalog of data sets: one YAML file each, with its recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cl_merge.errors import InputError, unknown_name
from cl_merge.sources import read_images

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class DataEntry:
    """What is known of a data set before it is read.

    Attributes:
        name: What the user wrote: a name of the catalog, a path or a hub id.
        source: Where the images come from; None if only a local copy will do.
        about: One line for people.
        recipe: Settings of a run that this data set brings along.
    """

    name: str
    source: str | None
    about: str
    recipe: Mapping[str, Any]


def catalog() -> list[str]:
    """The names of the data sets that come with a recipe."""
    folder = files("cl_merge.benchmarks.data")
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def find_data(name: str) -> DataEntry:
    """Look up a data set.

    Args:
        name: A name of the catalog, a folder or file, or a hub id.

    Returns:
        Its entry; for a path or a hub id one without a recipe.

    Raises:
        InputError: If a plain word is neither in the catalog nor a path.

    Example:
        >>> find_data("digits").source
        'builtin:digits'
    """
    known = catalog()
    if name in known:
        text = files("cl_merge.benchmarks.data").joinpath(f"{name}.yaml").read_text()
        settings: Any = OmegaConf.to_container(OmegaConf.create(text))
        return DataEntry(name, settings.pop("source", None), settings.pop("about"), settings)
    if not _looks_like_a_place(name):
        raise unknown_name("data set", name, [*known, "a folder", "OWNER/NAME on the hub"])
    return DataEntry(name, name, "", {})


def find_source(entry: DataEntry) -> str:
    """Find where a data set lies: a local copy, or what its recipe says.

    Args:
        entry: The data set.

    Returns:
        The folder of its name in the folder that the environment variable ``CL_MERGE_DATA`` names,
        if that is there; otherwise its source.

    Raises:
        InputError: If its recipe has no source, since it is nowhere to be had, and there is no
            local copy.
    """
    home = os.environ.get("CL_MERGE_DATA")
    local = Path(home).expanduser() / entry.name if home else None
    if local is not None and local.exists():
        return str(local)
    if entry.source is None:
        raise InputError(
            f"data set '{entry.name}' is read from a local copy: give its folder, "
            f"source=/path/to/{entry.name}, or set CL_MERGE_DATA to the folder that holds "
            f"{entry.name}/"
        )
    return entry.source


def open_data(source: str, *, revision: str | None = None) -> Mapping[str, datasets.Dataset]:
    """Read the images of a data set.

    Args:
        source: ``builtin:NAME``, a path, or a hub id.
        revision: Which commit of a hub data set.

    Returns:
        The splits by name.

    Raises:
        InputError: If it cannot be read.
    """
    if source == "builtin:digits":
        from cl_merge.benchmarks.digits import digits

        found: Mapping[str, datasets.Dataset] = digits()
        return found
    return read_images(source, revision=revision)


def _looks_like_a_place(name: str) -> bool:
    return "/" in name or name.endswith(".parquet") or Path(name).expanduser().exists()
