"""``cl-merge report``: tables, figures and a page to look at, of a suite or a run."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.cli.messages import show_messages
from cl_merge.errors import InputError
from cl_merge.files import atomic_write

if TYPE_CHECKING:
    from cl_merge.benchmarks.suite.definition import Suite

_DESCRIPTION = """\
Read what a suite or a run has found so far, and write its report: report.html, one file that needs
no network, and the figures in it. --format prints a table instead, to the terminal or to a file.
"""
FORMATS = ("markdown", "csv", "latex")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line.

    Args:
        commands: Where the commands are.
    """
    command = commands.add_parser(
        "report",
        help="tables, figures and a page to look at, of a suite or a run",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="FOLDER", help="of a suite or a run")
    command.add_argument("--open", action="store_true", help="show the page in a browser")
    command.add_argument("--format", choices=FORMATS, help="print the table instead")
    command.add_argument("--metric", default="accuracy", help="of the table [accuracy]")
    command.add_argument("--no-figures", action="store_true", help="without the figures")
    command.set_defaults(execute=report)


def report(parsed: argparse.Namespace) -> None:
    """Write the report of a folder, or print its table.

    Args:
        parsed: The words of the command.

    Raises:
        InputError: If the folder is of no suite or run, or there is no such metric.
    """
    from rich.console import Console

    from cl_merge.benchmarks.suite.folder import read_folder
    from cl_merge.benchmarks.suite.summary import summarize
    from cl_merge.benchmarks.suite.tables import csv_text, latex, markdown

    folder = Path(parsed.folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder")
    suite = read_folder(folder)
    if parsed.format:
        summary = summarize(suite, folder)
        text = (
            csv_text(summary)
            if parsed.format == "csv"
            else {"markdown": markdown, "latex": latex}[parsed.format](summary, parsed.metric)
        )
        sys.stdout.write(text)
        return
    console = Console(highlight=False)
    show_messages(console)
    page = make_report(console, suite, folder, figures=not parsed.no_figures, metric=parsed.metric)
    if parsed.open:
        webbrowser.open(page.resolve().as_uri())


def make_report(
    console: Any, suite: Suite, folder: Path, *, figures: bool, metric: str = "accuracy"
) -> Path:
    """Show a suite's table, and write it in all forms, with the figures.

    Args:
        console: Where to print.
        suite: What was asked for.
        folder: The suite's.
        figures: Whether to compute and draw the figures.
        metric: Of the table that is shown.

    Returns:
        The page.
    """
    from cl_merge.benchmarks.figures import figures_of
    from cl_merge.benchmarks.html import write_report
    from cl_merge.benchmarks.suite.summary import summarize
    from cl_merge.benchmarks.suite.tables import csv_text, latex, markdown, rich_table

    summary = summarize(suite, folder)
    console.print()
    console.print(rich_table(summary, metric))
    for name, text in (
        ("table.md", markdown(summary)),
        ("table.tex", latex(summary)),
        ("table.csv", csv_text(summary)),
    ):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text)
    drawn = figures_of(summary) if figures else []
    page = folder / "report.html"
    write_report(summary, drawn, page)
    console.print(f"{page} is the report; table.md, table.tex and table.csv lie beside it")
    return page
