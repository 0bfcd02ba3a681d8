"""The catalog of data sets: one YAML file each, with its recipe; users' own files work alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cl_merge.config.reading import read_yaml
from cl_merge.config.schema import described_keys
from cl_merge.data.sources import is_hub_id, read_images
from cl_merge.errors import InputError, nearest, unknown_name

if TYPE_CHECKING:
    import datasets

# What a file of a data set may say beside the settings of a run.
_OWN_KEYS = ("about", "extends", "sources", "facts")
_FACTS = ("train", "test", "classes", "domains", "tasks")


@dataclass(frozen=True)
class DataEntry:
    """What is known of a data set before it is read.

    Attributes:
        name: What it is called: a name of the catalog, the name of a file without its ending, a
            path or a hub id.
        source: Where the images come from; None if only a local copy will do, or if it is joined.
        about: One line for people.
        recipe: Settings of a run that this data set brings along.
        facts: What is known of its size: images in ``train`` and ``test``, ``classes``,
            ``domains``, ``tasks``; as far as it is known.
        sources: The data sets that it is joined from, in order; none for most.
        file: The user's file that describes it; None for the catalog's, a path or a hub id.
    """

    name: str
    source: str | None
    about: str
    recipe: Mapping[str, Any]
    facts: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    file: Path | None = None


def catalog() -> list[str]:
    """The names of the data sets that come with a recipe."""
    folder = files("cl_merge.benchmarks.datasets")
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def find_data(name: str) -> DataEntry:
    """Look up a data set.

    Args:
        name: A name of the catalog, a YAML file such as those of the catalog, a folder or other
            file with images, or a hub id.

    Returns:
        Its entry; for images or a hub id one without a recipe.

    Raises:
        InputError: If a plain word is neither in the catalog nor a path, or a file is wrong.

    Example:
        >>> find_data("digits").source
        'builtin:digits'
    """
    known = catalog()
    if name in known or is_data_file(name):
        return _entry(name)
    if not _looks_like_a_place(name):
        raise unknown_name(
            "data set", name, [*known, "a folder", "a YAML file", "OWNER/NAME on the hub"]
        )
    return DataEntry(name, name, "", {})


def is_data_file(name: str) -> bool:
    """Tell whether a data set is named by the YAML file that describes it.

    Args:
        name: What the user wrote.

    Returns:
        Whether it ends as the name of a YAML file.
    """
    return name.endswith((".yaml", ".yml"))


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
        in_file = f"write 'source: FOLDER' or a hub id into {entry.file}, or " if entry.file else ""
        raise InputError(
            f"data set '{entry.name}' is read from a local copy: {in_file}give its folder, "
            f"source=/path/to/{entry.name}, or set CL_MERGE_DATA to the folder that holds "
            f"{entry.name}/"
        )
    return entry.source


def open_data(source: str, **options: Any) -> Mapping[str, datasets.Dataset]:
    """Read the images of a data set.

    Args:
        source: ``builtin:NAME``, a path, or a hub id.
        **options: Those of `read_images`.

    Returns:
        The splits by name.

    Raises:
        InputError: If it cannot be read.
    """
    if source.startswith(_BUILTIN):
        found = source.removeprefix(_BUILTIN)
        if found not in _MAKERS:
            raise unknown_name("data set of the package", found, list(_MAKERS))
        return _MAKERS[found]()
    return read_images(source, **options)


def is_on_hub(source: str) -> bool:
    """Tell whether the images of a data set come from the hub.

    Args:
        source: As for `open_data`.

    Returns:
        Whether it is a hub id.
    """
    return not source.startswith(_BUILTIN) and is_hub_id(source)


def _entry(name: str) -> DataEntry:
    settings, file = _with_parents(name, ())
    about = settings.pop("about", "")
    facts = settings.pop("facts", None) or {}
    sources = tuple(settings.pop("sources", None) or ())
    source = settings.pop("source", None)
    _check(facts, sources, source, file or name)
    if sources:
        # Each of them has prompts of its own.
        settings.setdefault("prompts", None)
    stem = Path(name).stem if file else name
    return DataEntry(stem, source, about, settings, facts, sources, file)


def _with_parents(name: str, children: tuple[str, ...]) -> tuple[dict[str, Any], Path | None]:
    """Read the file of a data set, over the one that it extends."""
    if name in children:
        raise InputError(f"data set '{name}' extends itself: {' -> '.join([*children, name])}")
    file = Path(name).expanduser().resolve() if is_data_file(name) else None
    with as_file(files("cl_merge.benchmarks.datasets").joinpath(f"{name}.yaml")) as own:
        layer = read_yaml(file or own)
    _check_keys(layer, str(file or f"{name}.yaml"))
    given: Any = OmegaConf.to_container(layer)
    if file is not None:
        _resolve_places(given, file.parent)
    parent = given.pop("extends", None)
    if parent is None:
        return given, file
    if parent not in catalog() and not is_data_file(parent):
        raise unknown_name(f"data set in extends of {file or name}", parent, catalog())
    below, _ = _with_parents(parent, (*children, name))
    merged: Any = OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(given))
    )
    return merged, file


def _resolve_places(given: dict[str, Any], folder: Path) -> None:
    """Find what a user's file names beside itself, wherever the command is called from."""
    source = given.get("source")
    if isinstance(source, str):
        given["source"] = _beside(source, folder)
    if isinstance(given.get("extends"), str) and is_data_file(given["extends"]):
        given["extends"] = str(folder / given["extends"])
    if isinstance(given.get("sources"), list):
        given["sources"] = [
            str(folder / Path(str(name)).expanduser())
            if is_data_file(str(name))
            else _beside(str(name), folder)
            for name in given["sources"]
        ]


def _beside(place: str, folder: Path) -> str:
    path = folder / Path(place).expanduser()
    return str(path) if path.exists() or place.startswith((".", "~")) else place


def _check_keys(layer: DictConfig, origin: str) -> None:
    known = [*described_keys(), *_OWN_KEYS]
    for key in map(str, layer):
        if key not in known:
            raise InputError(f"{origin}: unknown key '{key}'{nearest(key, known)}")


def _check(facts: Any, sources: tuple[Any, ...], source: Any, origin: object) -> None:
    if not isinstance(facts, Mapping):
        raise InputError(
            f"{origin}: facts is {facts}; expected numbers by name: {', '.join(_FACTS)}"
        )
    for key, value in facts.items():
        if key not in _FACTS:
            raise InputError(f"{origin}: unknown key 'facts.{key}'{nearest(key, _FACTS)}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{origin}: facts.{key} is {value}; expected a whole number")
    if sources and source is not None:
        raise InputError(f"{origin}: has both source and sources; expected one of them")
    if source is not None and not isinstance(source, str):
        raise InputError(f"{origin}: source is {source}; expected a path or a hub id")


def _digits() -> Mapping[str, datasets.Dataset]:
    from cl_merge.benchmarks.datasets.digits import digits

    found: Mapping[str, datasets.Dataset] = digits()
    return found


def _characters() -> Mapping[str, datasets.Dataset]:
    from cl_merge.benchmarks.datasets.character_stream import characters

    found: Mapping[str, datasets.Dataset] = characters()
    return found


_BUILTIN = "builtin:"
_MAKERS = {"digits": _digits, "characters": _characters}


def _looks_like_a_place(name: str) -> bool:
    return "/" in name or name.endswith(".parquet") or Path(name).expanduser().exists()
