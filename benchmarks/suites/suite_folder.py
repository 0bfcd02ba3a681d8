"""The folder of a suite: what was asked for, kept beside its runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from cl_merge.benchmarks.formatting import counted
from cl_merge.benchmarks.methods.method import TRAININGS
from cl_merge.benchmarks.runs.settings import differing_settings
from cl_merge.benchmarks.suites.definition import Suite, find_suite, joined, to_yaml
from cl_merge.benchmarks.suites.plan import DONE, Job, state_of
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError, listing
from cl_merge.storage.files import atomic_write

log = logging.getLogger(__name__)

SUITE = "suite.yaml"

# In what a finished run may differ from the plan: it is one of several methods by name, has read
# the commit of its data, and trained on other devices.
_FREE = {"method", "compare", "stream.revision", "trainer.devices", "trainer.num_nodes"}
_FREE |= {"trainer.strategy", "trainer.accelerator"}
_FREE_OF_JOINT = {"stream.tasks", "stream.order", "evaluate"}


def together(suite: Suite, folder: Path) -> Suite:
    """Put together what a folder was asked for before, and what it is asked for now.

    Raises:
        InputError: If the folder is that of a single run, of another suite, or has runs with other
            settings.
    """
    for file in ("config.yaml", "results.json"):
        if (folder / file).exists():
            raise InputError(
                f"'{folder}' holds a single run ({file}); name another folder, or a new one"
            )
    if not (folder / SUITE).exists():
        return suite
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
    return joined(before, suite)


def remember(suite: Suite, folder: Path) -> None:
    """Add to the folder's ``suite.yaml`` what is asked for now."""
    text = to_yaml(together(suite, folder))
    with atomic_write(folder / SUITE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def warn_of_other_settings(jobs: Mapping[Job, RunConfig], folder: Path) -> None:
    """Say which runs that are done were made with other settings than they would have now.

    As where the recipe of a data set has changed, or a run was copied from elsewhere.
    """
    found: dict[str, str] = {}
    for job, config in jobs.items():
        saved = folder / job.path / "config.yaml"
        if not saved.exists() or state_of(job, folder) != DONE:
            continue
        try:
            differing = differing_settings(config, saved)
        except InputError as error:  # settings of an earlier version
            found[job.path] = str(error)
            continue
        free = _FREE | (_FREE_OF_JOINT if TRAININGS[job.training].joint else set())
        # Devices share out the images of a step.
        free |= {"stream.batch_size"} if "trainer.devices" in differing else set()
        for key in [key for key in differing if key not in free][:1]:
            before, now = differing[key]
            found[job.path] = f"{key}={before}, not {now}"
    if found:
        path, said = next(iter(found.items()))
        log.warning(
            f"{counted(len(found), 'finished run')} of {folder} had other settings than now, such "
            f"as {path} ({said}); they stay in the table: delete their folders to run them anew"
        )


def read_folder(folder: str | Path) -> Suite:
    """Read what a suite's folder was asked for."""
    file = Path(folder) / SUITE
    if not file.exists():
        files = [*file.parent.glob(f"*/{SUITE}"), *file.parent.glob("*/results.json")]
        below = listing(sorted({one.parent.name for one in files}), limit=8)
        several = f"; in it lie {below}: name one, or join them with --leaderboard PAGE.html"
        raise InputError(
            f"'{folder}' is no folder of a suite (no {SUITE}) nor of a finished run (no "
            f"results.json){several if files else ''}"
        )
    return find_suite(str(file))
