"""``cl-merge bench``: fill a table of data sets, methods and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.cli.process import StoppedError
from cl_merge.cli.terminal import quieten, show_findings, show_messages
from cl_merge.errors import InputError, was_interrupted

if TYPE_CHECKING:
    from cl_merge.benchmarks.suites.execution import Ended
    from cl_merge.benchmarks.suites.plan import Job

HELP = "fill a table of data sets, methods and seeds"
HINT = "Settings are written without dashes, as in stream.batch_size=64"
DESCRIPTION = """\
Run a suite: every method on every data set, number of tasks and seed. Methods that share a training
share it. What is done is never done again: the same command goes on where it was stopped, and tries
once more what failed. It leaves a folder with all runs, tables, figures and report.html.
"""
EPILOG = """\
examples:
  cl-merge bench table1 --check
  cl-merge bench offline --dry-run
  cl-merge bench offline --data digits,characters --seeds 3
  CL_MERGE_DATA=/photos cl-merge bench offline --data caltech101 --tasks 10 --parallel 2
  cl-merge bench table1 --data cifar100 --tasks 10 --methods magmax,ties --seeds 3 --dry-run
  cl-merge bench table1 --ddp 8 trainer.precision=bf16-mixed
  cl-merge bench table1 --cluster slurm_partition=gpu --cluster gpus_per_node=1
  cl-merge bench my-suite.yaml
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
    add = command.add_argument
    add(
        "suite",
        metavar="SUITE",
        help="offline, held-out, table1, table2, vision8, domains, mtil, mtil-offline or FILE.yaml",
    )
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of every run, see cl-merge run")
    several: dict[str, Any] = {"metavar": "A,B", "default": ""}
    add("--data", **several, help="only these data sets, with commas; others are added")
    add("--tasks", **several, help="only these numbers of tasks, with commas")
    about = "show only these methods, with commas; others of their training are evaluated too"
    add("--methods", **several, help=about)
    add("--seeds", metavar="N", help="how many; or a list, such as 1,2 (or '5,' for one)")
    about = "so many orders of classes, domains or data sets: the recipe's, the others drawn"
    add("--orders", type=int, metavar="N", help=about)
    add("--out", metavar="FOLDER", help="folder of the suite [runs/SUITE]")
    about = "show what would be done and downloaded, and how long it takes if earlier runs tell"
    add("--dry-run", action="store_true", help=about)
    about = "compare data sets, models, disk and folders with what the runs need; trains nothing"
    add("--check", action="store_true", help=about)
    add("--parallel", type=int, metavar="N", help="runs side by side [one for each GPU]")
    add("--ddp", type=int, metavar="N", help="one run at a time, on N devices together")
    about = "through submitit: cluster=slurm or local, and its parameters"
    add("--cluster", action="append", default=[], metavar="KEY=VALUE", help=about)
    about = "without the figures, some of which take minutes to measure"
    add("--no-figures", action="store_true", help=about)
    command.set_defaults(execute=bench)


def bench(parsed: argparse.Namespace) -> int:
    """Run what a suite lacks and write its report, or say what would be run.

    Returns 1 if a run did not finish, or a check found that something differs or is missing.
    """
    from rich.console import Console

    from cl_merge.benchmarks.suites import plan, terminal
    from cl_merge.benchmarks.suites.definition import find_suite, narrowed
    from cl_merge.benchmarks.suites.suite_folder import (
        remember,
        together,
        warn_of_other_settings,
    )
    from cl_merge.cli.report import make_report
    from cl_merge.training.journal import only_process

    suite = narrowed(
        find_suite(parsed.suite),
        data=_words(parsed.data),
        tasks=_numbers(parsed.tasks),
        methods=_words(parsed.methods),
        seeds=parsed.seeds,
        orders=parsed.orders,
        run=parsed.settings,
    )
    folder = Path(parsed.out or Path("runs") / suite.name).expanduser()
    # Methods that the runs of the folder have evaluated before stay in them.
    everything = replace(suite, methods=together(suite, folder).methods)
    jobs = plan.jobs_of(plan.make_plan(everything, folder))
    configs = [plan.job_config(job) for job in jobs]  # a wrong setting shows before anything runs
    console = Console(highlight=False)
    if parsed.check:
        from cl_merge.benchmarks.datasets.checking import check_runs

        quieten()
        with console.status("looking at what the runs need"):
            findings = check_runs(configs, folder)
        return show_findings(console, findings)
    if parsed.dry_run:
        from cl_merge.benchmarks.datasets.checking import data_needs

        terminal.show_plan(console, suite, jobs, folder)
        to_run = [c for job, c in zip(jobs, configs, strict=True) if not _is_done(job, folder)]
        quieten()
        terminal.show_downloads(console, data_needs(to_run))
        return 0
    show_messages(console)
    with only_process(folder):
        remember(suite, folder)
        warn_of_other_settings(dict(zip(jobs, configs, strict=True)), folder)
        left = [job for job in jobs if not _is_done(job, folder)]
        terminal.show_begin(console, suite, len(jobs), len(left), folder)
        unfinished = []
        try:
            for number, ended in enumerate(_run(left, folder, parsed), start=1):
                terminal.show_ended(console, ended, number, len(left), folder)
                unfinished += [ended] if ended.state != plan.DONE else []
            make_report(console, folder, figures="none" if parsed.no_figures else "all")
        except (Exception, KeyboardInterrupt, SystemExit) as stop:
            # Lightning answers Ctrl-C within an evaluation for a figure with an exit of its own.
            if was_interrupted(stop):
                raise StoppedError("the same command", stop) from stop
            raise
    terminal.show_unfinished(console, unfinished, folder)
    return 1 if unfinished else 0


def _is_done(job: Job, folder: Path) -> bool:
    from cl_merge.benchmarks.suites import plan

    return plan.state_of(job, folder) == plan.DONE


def _run(jobs: list[Job], folder: Path, parsed: argparse.Namespace) -> Iterator[Ended]:
    from cl_merge.benchmarks.suites.execution import run_here, run_on_cluster
    from cl_merge.benchmarks.suites.plan import on_devices
    from cl_merge.config.reading import parse_arguments

    parallel = parsed.parallel
    if parsed.cluster and parallel is not None:
        raise InputError("--cluster hands on all runs at once; leave out --parallel")
    if parsed.ddp is not None:
        if parallel not in (None, 1):
            raise InputError("--ddp runs one job at a time; leave out --parallel")
        jobs, parallel = [on_devices(job, parsed.ddp) for job in jobs], 1
    if parsed.cluster:
        return run_on_cluster(jobs, folder, parse_arguments(parsed.cluster))
    return run_here(jobs, folder, parallel)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if any(not word.isdigit() or int(word) < 1 for word in words):
        raise InputError(f"--tasks {text}; expected numbers with commas, such as 5,10,20")
    return [int(word) for word in words]
