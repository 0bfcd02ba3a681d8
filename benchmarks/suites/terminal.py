"""What a suite says while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cl_merge.benchmarks.formatting import counted, duration, rounded
from cl_merge.benchmarks.runs.results import finished_results, read_results
from cl_merge.benchmarks.suites.definition import Suite
from cl_merge.benchmarks.suites.execution import LOG, Ended
from cl_merge.benchmarks.suites.plan import DONE, FAILED, Job, state_of
from cl_merge.data.hub import Needs, size


def show_plan(console: Console, suite: Suite, jobs: Sequence[Job], folder: Path) -> None:
    """Show what would be run, and how long it will take as far as earlier runs tell."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    # Only the methods wrap: as long as one column gives way, rich does not cut the others.
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("about", justify="right", no_wrap=True)
    table.add_column("methods", overflow="fold")
    times, states = expected_seconds(jobs, folder), [state_of(job, folder) for job in jobs]
    for job, state in zip(jobs, states, strict=True):
        colour = {DONE: "green", FAILED: "red"}.get(state, "")
        shown = f"[{colour}]{state}[/]" if colour else state
        time = "" if state == DONE else duration(times[job]) if job in times else "?"
        table.add_row(escape(job.path), shown, time, escape(", ".join(job.methods)))
    console.print(table)
    left = [job for job, state in zip(jobs, states, strict=True) if state != DONE]
    axes = {"setting": len(suite.settings), "method": len(suite.shown), "seed": len(suite.seeds)}
    console.print(
        f"{suite.name}: {counted(prod(axes.values()), 'cell')} "
        f"({', '.join(counted(number, axis) for axis, number in axes.items())}) "
        f"from {counted(len(jobs), 'run')} in {folder}, "
        f"{states.count(DONE)} of them done; {_time_left(left, times)}",
        soft_wrap=True,
        markup=False,
    )


def show_downloads(console: Console, needs: Mapping[str, Needs | str]) -> None:
    """Say what is to be downloaded before the runs, of each data set of the hub and together."""
    known = {name: found for name, found in needs.items() if isinstance(found, Needs)}
    for name, found in needs.items():
        told = found if name in known else f"how much is to be downloaded is not known: {found}"
        console.print(f"{name}: {told}", markup=False, soft_wrap=True)
    for path, number, free in sum(known.values(), Needs(0, 0)).by_disk() if known else ():
        console.print(
            f"together {size(number)} at {path}, where {size(free)} are free; the weights of "
            "models and what runs write come on top",
            markup=False,
            soft_wrap=True,
        )


def expected_seconds(jobs: Sequence[Job], folder: Path) -> dict[Job, float]:
    """How long jobs take by the finished runs of the same setting and training, where there are.

    A run that has finished and is given more methods only evaluates those.
    """
    kinds = {job: job.path.replace(f"/seed{job.seed}/", "/", 1) for job in jobs}
    known: dict[str, list[float]] = {}
    joining = {}
    for job, kind in kinds.items():
        if (results := read_results(folder / job.path)) is not None:
            seconds, methods = results["total"]["seconds"], results["methods"]
            known.setdefault(kind, []).append(seconds)
            trained = sum(cost["seconds"] for own in results["training"].values() for cost in own)
            missing = len(set(job.methods) - methods.keys())
            joining[job] = max(seconds - trained, 0.0) * missing / len(methods)
    times = {job: median(known[kind]) for job, kind in kinds.items() if kind in known}
    return times | joining


def _time_left(left: Sequence[Job], times: dict[Job, float]) -> str:
    if not left:
        return "nothing is left to do"
    known = [times[job] for job in left if job in times]
    if not known:
        return "how long they take is not known before one of them has finished"
    said = f"about {duration(sum(known))} left on this machine, one at a time"
    unknown = len(left) - len(known)
    return f"{said}, and {counted(unknown, 'run')} of unknown length" if unknown else said


def show_begin(console: Console, suite: Suite, jobs: int, left: int, folder: Path) -> None:
    """Say how many runs there are, and how many of them are left to do."""
    done = f", {jobs - left} of them done" if left < jobs else ""
    done = done if left else ", all done; nothing is left to do"
    console.print(
        f"{suite.name} in {folder}: {counted(jobs, 'run')}{done}", markup=False, soft_wrap=True
    )


def show_ended(console: Console, ended: Ended, number: int, jobs: int, folder: Path) -> None:
    """Say how a run ended, the `number`-th of so many jobs."""
    said = escape(f"{number}/{jobs} {ended.job.path}, {duration(ended.seconds)}: ")
    if ended.state == DONE:
        methods = finished_results(folder / ended.job.path)["methods"]
        said += ", ".join(
            f"{escape(name)} {rounded(methods[name]['accuracy'])}" for name in ended.job.methods
        )
    else:
        colour = "red" if ended.state == FAILED else "yellow"
        said += f"[{colour}]{ended.state}[/] {escape(ended.reason)}"
    console.print(said, soft_wrap=True)


def show_unfinished(console: Console, unfinished: Sequence[Ended], folder: Path) -> None:
    """Name the runs that failed or were interrupted, and where they said why."""
    for ended in unfinished:
        console.print(
            f"[red]{ended.state}[/] {escape(str(folder / ended.job.path / LOG))}", soft_wrap=True
        )
        console.print(f"  {ended.reason}", markup=False, soft_wrap=True)
    if unfinished:
        console.print("the same command tries these once more, and nothing else")
