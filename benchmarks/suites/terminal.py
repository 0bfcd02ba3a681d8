"""What a suite says while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cl_merge.benchmarks.formatting import duration, rounded
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.suites.definition import Suite
from cl_merge.benchmarks.suites.execution import LOG, Ended
from cl_merge.benchmarks.suites.plan import DONE, FAILED, Job, state_of


def show_plan(
    console: Console,
    suite: Suite,
    jobs: Sequence[Job],
    folder: Path,
    seconds: Mapping[str, float | None],
) -> None:
    """Show what would be run.

    Args:
        console: Where to print.
        suite: The suite.
        jobs: Its jobs.
        folder: Where it would write.
        seconds: What each job would take here, by its place; None where that is not known.
    """
    rows, left, unknown = [], 0.0, False
    states = [state_of(job, folder) for job in jobs]
    for job, state in zip(jobs, states, strict=True):
        time = seconds[job.place]
        if state != DONE:
            left += time or 0.0
            unknown |= time is None
        shown = "" if state == DONE else "?" if time is None else duration(time)
        rows.append((escape(job.place), state, shown, escape(", ".join(job.methods))))
    console.print(_plan_table(rows))
    cells = len(suite.settings) * len(suite.shown) * len(suite.seeds)
    done = states.count(DONE)
    console.print(
        f"{suite.name}: {cells} cells ({len(suite.settings)} settings, {len(suite.shown)} methods, "
        f"{len(suite.seeds)} seeds) from {len(jobs)} runs in {folder}, {done} of them done; "
        f"{'more than' if unknown else 'about'} {duration(left)} left on this machine, one at a "
        "time",
        soft_wrap=True,
        markup=False,
    )


def _plan_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    # Only the methods wrap: what cannot, rich leaves whole as long as anything else gives way.
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("about", justify="right", no_wrap=True)
    table.add_column("methods", overflow="fold")
    for run, state, about, methods in rows:
        colour = {DONE: "green", FAILED: "red"}.get(state, "")
        table.add_row(run, f"[{colour}]{state}[/]" if colour else state, about, methods)
    return table


def show_begin(console: Console, suite: Suite, jobs: int, left: int, folder: Path) -> None:
    """Say what is about to be run.

    Args:
        console: Where to print.
        suite: The suite.
        jobs: How many runs it has.
        left: How many of them are not done.
        folder: Where it writes.
    """
    said = f"{suite.name} in {folder}: {jobs} {'run' if jobs == 1 else 'runs'}"
    done = f", {jobs - left} of them done" if left < jobs else ""
    console.print(
        f"{said}, all done; nothing is left to do" if not left else said + done, markup=False
    )


def show_ended(console: Console, ended: Ended, number: int, jobs: int, folder: Path) -> None:
    """Say how a run ended.

    Args:
        console: Where to print.
        ended: The run.
        number: How many have ended with it.
        jobs: How many there are.
        folder: The suite's.
    """
    said = escape(f"{number}/{jobs} {ended.job}, {duration(ended.seconds)}: ")
    if ended.state == DONE:
        methods = finished_results(folder / ended.job.place)["methods"]
        said += ", ".join(
            f"{escape(name)} {rounded(methods[name]['accuracy'])}" for name in ended.job.methods
        )
    else:
        colour = "red" if ended.state == FAILED else "yellow"
        said += f"[{colour}]{ended.state}[/] {escape(ended.reason)}"
    console.print(said, soft_wrap=True)


def show_failures(console: Console, failed: Sequence[Ended], folder: Path) -> None:
    """Name the runs that failed, and where they said why.

    Args:
        console: Where to print.
        failed: Those runs.
        folder: The suite's.
    """
    for ended in failed:
        console.print(
            f"[red]failed[/] {escape(str(folder / ended.job.place / LOG))}", soft_wrap=True
        )
        console.print(f"  {ended.reason}", markup=False, soft_wrap=True)
    if failed:
        console.print("the same command tries once more what failed, and nothing else")
