"""From the words of a command line to the configuration of a run, new or begun before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.datasets.catalog import absolute_data, absolute_source, find_data
from cl_merge.benchmarks.methods.method import absolute_path, compared_methods, find_method
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.config.reading import flat, parse_arguments, read_config, read_yaml
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError

# Settings that change nothing in what a run finds; everything else is fixed once it has begun.
_FREE = {"out", "source", "checkpoint_seconds", "stream.num_workers", "stream.cache", "loggers"}
_FREE |= {"merge.beside"}  # empty; what it says of a method that is there already is fixed
_BESIDE = "merge.beside."


def read_settings(settings: Sequence[str], file: str | Path | None = None) -> RunConfig:
    """Read the configuration of a run: ``key=value`` words over a file over the data's recipe.

    If ``out`` names the folder of a run that was begun, its configuration takes the place of the
    recipe, and what is given must agree with it.

    Example:
        >>> read_settings(["method=ties"]).method
        'ties'
    """
    given = (read_yaml(file) if file is not None else {}) | parse_arguments(settings)
    out = given.get("out")
    begun = Path(str(out)).expanduser() / "config.yaml" if out is not None else None
    if begun is not None and os.path.lexists(begun):
        saved = read_yaml(begun)
        config = _with_absolute_paths(read_config(settings, saved, file, origin=str(begun)))
        check_same_run(config, begun)
        return config
    entry = find_data(str(given.get("data", RunConfig.data)))
    origin = str(entry.file or f"the recipe of {entry.name}")
    config = _with_absolute_paths(read_config(settings, entry.recipe, file, origin=origin))
    find_method(config.method)
    return config


def check_same_run(config: RunConfig, saved: Path) -> None:
    """Refuse a configuration that differs, where it matters, from the saved one of a folder."""
    differing = differing_settings(config, saved)
    if differing:
        (key, (before, now)), others = next(iter(differing.items())), len(differing) - 1
        more = f" ({others} more settings differ)" if others else ""
        raise InputError(
            f"out={saved.parent} holds a run with {key}={before}, not {now}{more}; name a new "
            "folder, or leave the setting out to go on with that run"
        )


def differing_settings(config: RunConfig, saved: Path) -> dict[str, tuple[Any, Any]]:
    """The settings that would change what a saved run found, with their values there and here."""
    former = _with_absolute_paths(read_config([], {}, saved))
    methods, now_methods = (compared_methods(c.method, c.compare) for c in (former, config))
    merging = {method.plain.name for method in methods}
    joins = {method.name for method in methods} <= {method.name for method in now_methods}

    def free(key: str) -> bool:
        """Whether a setting may differ: methods can join a run, with options of their own."""
        if key.startswith(_BESIDE):
            return key.removeprefix(_BESIDE).split(".")[0] not in merging
        return key in _FREE or key.startswith("loggers.") or (key == "compare" and joins)

    before, now = flat(asdict(former)), flat(asdict(config))
    pairs = {key: (before.get(key), now.get(key)) for key in before | now if not free(key)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def finished_methods(folder: Path) -> set[str]:
    """The methods that a run's folder has results of; none if no run has finished there."""
    return set((read_results(folder) or {}).get("methods", {}))


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Name the user's files from the root, so that a run goes on wherever it is called from."""
    config.data = absolute_data(config.data)
    config.source = None if config.source is None else absolute_source(config.source)
    config.probe = [absolute_data(str(name)) for name in config.probe]
    config.method = absolute_path(config.method)
    if isinstance(config.compare, str) and config.compare != "all":
        config.compare = config.compare.split(",")
    if isinstance(config.compare, list):
        config.compare = [absolute_path(str(name)) for name in config.compare]
    return config
