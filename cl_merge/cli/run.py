"""``cl-merge run``: learn a stream of tasks and show what merging gives."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cl_merge.cli.process import StoppedError
from cl_merge.cli.terminal import quieten, show_findings, show_messages
from cl_merge.errors import InputError, was_interrupted

HELP = "learn a stream of tasks and show what merging gives"
HINT = "Settings are written without dashes, as in stream.tasks=5"
DESCRIPTION = """\
Learn a stream of tasks, merge what each task changed, and show what that gives.

Without settings: scikit-learn's digits in five tasks, with a small model that comes along. It
leaves a folder with the merged weights, every task vector, results.json, logs and two pictures.
A run that was stopped goes on with out=FOLDER; no other setting is needed.
"""
_EXAMPLES = """\
examples:
  cl-merge run
  cl-merge run method=ties stream.tasks=2 trainer.max_epochs=1 seed=3
  cl-merge run data=/photos model=lite image_size=96 stream.tasks=10 out=runs/photos
  cl-merge run data=/photos model=ViT-B-16:openai trainer.devices=2 trainer.strategy=ddp
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
    command.epilog = _key_help() + "\n" + _EXAMPLES
    add = command.add_argument
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings, see below")
    add("--config", metavar="FILE", help="YAML file of settings")
    about = "compare data, model, disk and folders with what the run needs; trains nothing"
    add("--check", action="store_true", help=about)
    command.set_defaults(execute=execute)


def execute(parsed: argparse.Namespace) -> int | None:
    """Run, or say whether all that the run needs is there: 1 if not."""
    if parsed.check:
        return check(parsed.settings, parsed.config)
    run(parsed.settings, parsed.config)
    return None


def check(settings: Sequence[str], file: str | None = None) -> int:
    """Compare what a run needs with what there is; 1 if something differs or is missing."""
    from rich.console import Console

    from cl_merge.benchmarks.datasets.checking import check_runs
    from cl_merge.benchmarks.runs.settings import read_settings

    config = read_settings(settings, file)
    quieten()
    out = Path(config.out or "runs").expanduser()
    console = Console(highlight=False)
    with console.status("looking at what the run needs"):
        findings = check_runs([config], out)
    return show_findings(console, findings)


def run(settings: Sequence[str], file: str | None = None) -> None:
    """Learn a stream of tasks, show what merging gives, and leave a run folder."""
    from rich.console import Console

    from cl_merge.benchmarks.methods.method import compared_methods
    from cl_merge.benchmarks.reports.run_pictures import draw_pictures
    from cl_merge.benchmarks.reports.run_terminal import show_results, show_start, show_task
    from cl_merge.benchmarks.runs.settings import finished_methods, read_settings
    from cl_merge.training.journal import is_first_process

    config = read_settings(settings, file)
    console = Console(quiet=not is_first_process(), highlight=False)
    folder = Path(config.out).expanduser() if config.out else None
    names = {method.name for method in compared_methods(config.method, config.compare)}
    if folder is not None and names <= finished_methods(folder):
        console.print(f"{folder} holds this run, finished; nothing is left to do", markup=False)
        show_results(console, folder)
        return
    quieten()
    show_messages(console)
    # What follows loads torch's libraries and a model, which takes seconds: wrong settings first.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from cl_merge.benchmarks.runs.progress import RunProgress
    from cl_merge.benchmarks.runs.results import resume_command
    from cl_merge.benchmarks.runs.run import collect_results, count_batches, start_run
    from cl_merge.benchmarks.runs.training import run_stream

    started = start_run(config)
    try:
        show_start(console, started)
        with RunProgress(console, count_batches(started)) as progress:
            run_stream(started, progress, lambda *done: show_task(console, *done))
        found = collect_results(started)
        if is_first_process():
            draw_pictures(found, started.folder.path)
        # The last thing that is written: what has it is whole.
        started.folder.finish(found)
        if is_first_process():
            show_results(console, started.folder.path)
    except (Exception, KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, (SystemExit, OSError)) or was_interrupted(stop):
            raise StoppedError(resume_command(started.folder.path), stop) from stop
        if isinstance(stop, MisconfigurationException):
            raise InputError(f"trainer: {' '.join(str(stop).split())}") from stop
        raise
    finally:
        started.folder.release()


def _key_help() -> str:
    from cl_merge.benchmarks.datasets.catalog import catalog
    from cl_merge.benchmarks.methods.method import METHODS
    from cl_merge.config.schema import default_of, described_keys
    from cl_merge.mergers import MERGERS

    wrapped = partial(textwrap.wrap, width=100, break_on_hyphens=False)
    lines = ["settings:"]
    for key, about in described_keys().items():
        default = default_of(key)
        shown = f"  [{default}]" if default is not None else ""
        lines += wrapped(f"  {key:<26}{about}{shown}", subsequent_indent=" " * 28)
    others = [name for name in MERGERS if name not in METHODS]
    for text in (
        "data sets: " + ", ".join(catalog()),
        "methods: " + ", ".join(METHODS),
        "and, of independent or sequential training, as in NAME-sequential: " + ", ".join(others),
        "or a method of your own: FILE.py:NAME",
        "what merges may end in -drift, for a scale that is lowered where features drift too far, "
        "in -statistics, for class statistics beside the text head, or in -aligned, for those "
        "inside the image projection, as in ties-aligned",
    ):
        lines += ["", *wrapped(text, subsequent_indent="  ")]
    return "\n".join(lines) + "\n"
