"""The catalog of data sets: one YAML file each, with its recipe; users' own files work alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cl_merge.config.reading import read_yaml
from cl_merge.config.schema import described_keys
from cl_merge.data.sources import is_hub_id, read_images
from cl_merge.errors import InputError, nearest, unknown_name

if TYPE_CHECKING:
    import datasets

# What the file of a data set may hold besides settings of a run.
_OWN_KEYS = ("about", "extends", "sources", "facts")
_FACTS = ("train", "test", "classes", "domains", "tasks")

# Modules with a function of the same name that makes the data set.
_BUILTIN = "builtin:"
_MADE_HERE = ("digits", "characters")


@dataclass(frozen=True)
class DataEntry:
    """What is known of a data set before it is read."""

    name: str  # of the catalog, of a file without its ending, a path or a hub id
    source: str | None  # of the images; None if only a local copy will do, or if it is joined
    about: str
    recipe: Mapping[str, Any]  # settings of a run
    facts: Mapping[str, int] = field(default_factory=dict)  # of its size, as far as it is known
    sources: tuple[str, ...] = ()  # the data sets that it is joined from, in order
    file: Path | None = None  # the user's file that describes it


def catalog() -> list[str]:
    """The names of the data sets that come with a recipe."""
    folder = files("cl_merge.benchmarks.datasets")
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def find_data(name: str) -> DataEntry:
    """Look up a data set: in the catalog, in a user's YAML file, images on disk, or a hub id.

    Images and a hub id have no recipe.

    Example:
        >>> find_data("digits").source
        'builtin:digits'
    """
    known = catalog()
    if name in known or is_data_file(name):
        return _entry(name)
    path = Path(name).expanduser()
    if not ("/" in name or path.suffix == ".parquet" or path.exists()):
        others = ["a folder", "a YAML file", "OWNER/NAME on the hub"]
        raise unknown_name("data set", name, [*others, *known])
    return DataEntry(name, name, "", {})


def is_data_file(name: str) -> bool:
    """Whether a data set is named by the YAML file that describes it."""
    return name.endswith((".yaml", ".yml"))


def absolute_data(name: str) -> str:
    """Name the file or folder of a data set from the root; other names stay as they are.

    Example:
        >>> absolute_data("digits"), absolute_data("/photos/../birds.yaml")
        ('digits', '/birds.yaml')
    """
    if is_data_file(name):
        return str(Path(name).expanduser().resolve())
    return name if name in catalog() else absolute_source(name)


def absolute_source(source: str) -> str:
    """Name from the root what images are read from, if it is on this machine."""
    path = os.path.expanduser(source)
    # Not what a link stands for: the name of the link is the one that people know.
    return os.path.abspath(path) if os.path.exists(path) else source


def find_source(entry: DataEntry) -> str:
    """Where a data set lies: in the folder ``CL_MERGE_DATA``, or what its recipe says."""
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
    """Read the images of a data set: ``builtin:NAME``, or a source of `read_images`."""
    if not source.startswith(_BUILTIN):
        return read_images(source, **options)
    name = source.removeprefix(_BUILTIN)
    if name not in _MADE_HERE:
        raise unknown_name("data set of the package", name, _MADE_HERE)
    make = getattr(import_module(f"cl_merge.benchmarks.datasets.{name}"), name)
    made: Mapping[str, datasets.Dataset] = make()
    return made


def is_on_hub(source: str) -> bool:
    """Whether a source of `open_data` is a hub id."""
    return not source.startswith(_BUILTIN) and is_hub_id(source)


def _entry(name: str) -> DataEntry:
    settings, file = _with_parents(name, ())
    about, source = settings.pop("about", ""), settings.pop("source", None)
    facts = settings.pop("facts", None) or {}
    sources = tuple(settings.pop("sources", None) or ())
    _check(facts, sources, source, file or name)
    if sources:
        settings.setdefault("prompts", None)  # each of them has its own
    stem = Path(name).stem if file else name
    return DataEntry(stem, source, about, settings, facts, sources, file)


def _with_parents(name: str, children: tuple[str, ...]) -> tuple[dict[str, Any], Path | None]:
    """Read the file of a data set, over the one that it extends."""
    if name in children:
        raise InputError(f"data set '{name}' extends itself: {' -> '.join([*children, name])}")
    file = Path(name).expanduser().resolve() if is_data_file(name) else None
    with as_file(files("cl_merge.benchmarks.datasets").joinpath(f"{name}.yaml")) as own:
        given = read_yaml(file or own)
    known = [*described_keys(), *_OWN_KEYS]
    for key in map(str, given):
        if key not in known:
            raise InputError(f"{file or f'{name}.yaml'}: unknown key '{key}'{nearest(key, known)}")
    if file is not None:
        _resolve_paths(given, file.parent)
    parent = given.pop("extends", None)
    if parent is None:
        return given, file
    if parent not in catalog() and not is_data_file(parent):
        raise unknown_name(f"data set in extends of {file or name}", parent, catalog())
    below, _ = _with_parents(parent, (*children, name))
    merged: Any = OmegaConf.to_container(OmegaConf.merge(below, given))
    return merged, file


def _resolve_paths(given: dict[str, Any], folder: Path) -> None:
    """Find what a user's file names relative to itself, wherever the command is called from."""
    for key in ("source", "extends"):
        name = given.get(key)
        if isinstance(name, str) and (key == "source" or is_data_file(name)):
            given[key] = _resolved(name, folder)
    if isinstance(given.get("sources"), list):
        given["sources"] = [_resolved(str(name), folder) for name in given["sources"]]


def _resolved(name: str, folder: Path) -> str:
    path = folder / Path(name).expanduser()
    is_path = is_data_file(name) or path.exists() or name.startswith((".", "~"))
    return str(path) if is_path else name


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
