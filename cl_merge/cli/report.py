"""``cl-merge report``: tables, figures and a page to look at, of a suite or a run."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from cl_merge.cli.terminal import quieten, show_messages
from cl_merge.errors import InputError, listing

if TYPE_CHECKING:
    from rich.console import Console

    from cl_merge.benchmarks.reports.figures import Drawing
    from cl_merge.benchmarks.reports.summary import Summary

HELP = "tables, figures and a page to look at, of a suite or a run"
DESCRIPTION = """\
Read what a suite or a run has found so far, and write its report: report.html, one file that needs
no network, with the figures that have been measured. --format prints the table instead.
--leaderboard joins any number of suites and runs, also from other machines, into one page.
"""
FORMATS = ("markdown", "csv", "latex")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
    add = command.add_argument
    add("folders", metavar="FOLDER", nargs="+", help="of a suite or a run; several: --leaderboard")
    add("--open", action="store_true", help="show the page in a browser")
    add("--format", choices=FORMATS, help="print the table instead")
    add("--metric", default="accuracy", help="of the table [accuracy]")
    add("--measure", action="store_true", help="also what figures need that was not measured yet")
    add("--no-figures", action="store_true", help="without the figures")
    leaderboard = "join every results.json in FOLDERs into one page [leaderboard.html]"
    add("--leaderboard", metavar="PAGE", nargs="?", const="leaderboard.html", help=leaderboard)
    add("--published", metavar="FILE", help="YAML of figures of others, shown in a leaderboard")
    command.set_defaults(execute=report)


def report(parsed: argparse.Namespace) -> None:
    """Write the report of a folder, or print its table."""
    from rich.console import Console

    folders = [Path(folder).expanduser() for folder in parsed.folders]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"'{folder}' is no folder")
    console = Console(highlight=False)
    show_messages(console)
    if parsed.leaderboard:
        for option, given in (
            ("--format", parsed.format),
            ("--metric", parsed.metric != "accuracy"),
            ("--measure", parsed.measure),
            ("--no-figures", parsed.no_figures),
        ):
            if given:
                raise InputError(
                    f"{option}: not with --leaderboard, whose page has every metric and no figures"
                )
        page = _make_leaderboard(console, folders, Path(parsed.leaderboard), parsed.published)
        if parsed.open:
            webbrowser.open(page.resolve().as_uri())
        return
    if len(folders) > 1 or parsed.published:
        what = "several folders" if len(folders) > 1 else "--published"
        raise InputError(f"{what}: only with --leaderboard, which joins them")
    folder = folders[0]
    if parsed.format:
        sys.stdout.write(_table(_summary(folder), parsed.format, parsed.metric))
        return
    figures = "none" if parsed.no_figures else "all" if parsed.measure else "measured"
    page = make_report(console, folder, figures=figures, metric=parsed.metric)
    if parsed.open:
        webbrowser.open(page.resolve().as_uri())


def make_report(
    console: Console, folder: Path, *, figures: str = "measured", metric: str = "accuracy"
) -> Path:
    """Show the table of a suite or a run, write its report, and give the page's path.

    Figures are ``"all"``, which measures what has not been measured, ``"measured"`` or ``"none"``.
    """
    from cl_merge.benchmarks.reports.html import write_report
    from cl_merge.benchmarks.reports.summary import over_orders
    from cl_merge.benchmarks.reports.tables import legend_of, rich_tables, title_of
    from cl_merge.storage.files import atomic_write

    quieten()
    summary = _summary(folder)
    together = over_orders(summary)
    for shown in (summary, together) if together else (summary,):
        parts = rich_tables(shown, metric, console.width)  # an unknown metric is named first
        console.print(f"\n{title_of(shown, metric)}", style="italic", markup=False)
        for part in parts:
            console.print(part)
        console.print(legend_of(shown, metric), style="dim", markup=False)
    page = folder / "report.html"
    write_report(summary, _drawings(console, summary, folder, figures), page)
    for ending, form in (("md", "markdown"), ("tex", "latex"), ("csv", "csv")):
        with atomic_write(folder / f"table.{ending}") as temporary:
            temporary.write_text(_table(summary, form, "accuracy"), encoding="utf-8")
    said = f"{page} is the report; table.md, table.tex and table.csv lie beside it"
    console.print(said, soft_wrap=True, markup=False)
    return page


def _make_leaderboard(
    console: Console, folders: list[Path], page: Path, published: str | None
) -> Path:
    """Join the results below folders into one page, and give its path."""
    from cl_merge.benchmarks.formatting import counted
    from cl_merge.benchmarks.reports.html import write_leaderboard
    from cl_merge.benchmarks.reports.leaderboard import read_leaderboard

    if page.suffix != ".html":
        raise InputError(
            f"--leaderboard {page}: expected a page to write, as in leaderboard.html; folders "
            "stand before the option"
        )
    board = read_leaderboard(folders, Path(published).expanduser() if published else None)
    write_leaderboard(board, page)
    said = (
        f"{page}: {counted(len(board.rows), 'method')} on {counted(len(board.streams), 'stream')}"
    )
    console.print(said, soft_wrap=True, markup=False)
    if board.refused:
        console.print(
            f"left out, for they do not say the command that found them: {listing(board.refused)}",
            soft_wrap=True,
            markup=False,
        )
    return page


def _summary(folder: Path) -> Summary:
    from cl_merge.benchmarks.reports.summary import summarize, summary_of_run
    from cl_merge.benchmarks.suites.suite_folder import read_folder

    if (folder / "results.json").exists():
        return summary_of_run(folder)
    return summarize(read_folder(folder), folder)


def _table(summary: Summary, form: str, metric: str) -> str:
    from cl_merge.benchmarks.reports.summary import over_orders
    from cl_merge.benchmarks.reports.tables import csv_text, latex, markdown

    if form == "csv":
        return csv_text(summary)
    write, together = markdown if form == "markdown" else latex, over_orders(summary)
    orders = f"\n{write(together, metric)}" if together else ""
    return write(summary, metric) + orders


def _drawings(console: Console, summary: Summary, folder: Path, figures: str) -> list[Drawing]:
    if figures == "none":
        return []
    if (folder / "results.json").exists():
        from cl_merge.benchmarks.reports.run_pictures import pictures_of_run

        return pictures_of_run(folder, summary.suite.settings[0].name)
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from cl_merge.benchmarks.reports.figures import figures_of

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as shown:
        bar = shown.add_task("figures", total=None)

        def progress(said: str, done: int, total: int) -> None:
            shown.update(bar, description=said, completed=done, total=total)

        return figures_of(folder, evaluate=figures == "all", progress=progress)
