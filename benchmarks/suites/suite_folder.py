"""The folder of a suite: what was asked for, kept beside its runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from cl_merge.benchmarks.suites.definition import Suite, find_suite, joined, to_yaml
from cl_merge.errors import InputError
from cl_merge.storage.files import atomic_write
from cl_merge.training.journal import only_process

SUITE = "suite.yaml"


def hold(folder: Path) -> AbstractContextManager[None]:
    """Hold a suite's folder against other processes, as long as the context lasts."""
    for file in ("config.yaml", "results.json"):
        if (folder / file).exists():
            raise InputError(
                f"'{folder}' holds a single run ({file}); name another folder, or a new one"
            )
    return only_process(folder)


def with_former_methods(suite: Suite, folder: Path) -> Suite:
    """Add the methods that runs of a folder have evaluated before, so that they stay in them."""
    if not (folder / SUITE).exists():
        return suite
    methods = dict.fromkeys((*suite.methods, *read_folder(folder).methods))
    return replace(suite, methods=tuple(methods))


def remember(suite: Suite, folder: Path) -> None:
    """Add to the folder's ``suite.yaml`` what is asked for now."""
    if (folder / SUITE).exists():
        before = read_folder(folder)
        if before.name != suite.name:
            raise InputError(
                f"'{folder}' holds suite '{before.name}', not '{suite.name}'; name another folder"
            )
        former = {setting.name: setting.run for setting in before.settings}
        for key, one, other in (
            ("run settings", before.run, suite.run),
            ("published", before.published, suite.published),
            *((f"run of {s.name}", former.get(s.name, s.run), s.run) for s in suite.settings),
        ):
            if one != other:
                raise InputError(
                    f"'{folder}' was begun with {key} {one or 'none'}, not {other or 'none'}; "
                    "give the same, or name another folder"
                )
        suite = joined(before, suite)
    with atomic_write(folder / SUITE) as temporary:
        temporary.write_text(to_yaml(suite), encoding="utf-8")


def read_folder(folder: str | Path) -> Suite:
    """Read what a suite's folder was asked for."""
    file = Path(folder) / SUITE
    if not file.exists():
        raise InputError(
            f"'{folder}' is no folder of a suite (no {SUITE}) nor of a finished run (no "
            "results.json)"
        )
    return find_suite(str(file))
