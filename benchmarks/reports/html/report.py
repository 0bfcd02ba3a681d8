"""Write the report: everything in one file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined

from cl_merge.benchmarks.reports.html.block import data_block
from cl_merge.benchmarks.reports.html.content import make_content
from cl_merge.benchmarks.reports.html.drawn import Drawn
from cl_merge.benchmarks.reports.html.entries import STATES
from cl_merge.benchmarks.reports.summary import METRICS, Summary
from cl_merge.benchmarks.reports.tables import TITLES
from cl_merge.storage.files import atomic_write

_TEMPLATE, _STYLE, _SCRIPT = "report.html", "report.css", "report.js"


def write_report(summary: Summary, figures: Sequence[Drawn], path: str | Path) -> None:
    """Write the report of a suite, or of a single run.

    Args:
        summary: Of the suite, or by `summary_of_run`.
        figures: What was drawn for it.
        path: The HTML file. It loads nothing from elsewhere; links to the runs' own files are
            relative to it. The same input gives the same bytes.

    Raises:
        InputError: If a figure is no SVG.
        StorageError: If the file cannot be written.

    Example::

        write_report(summarize(suite, folder), figures, folder / "report.html")
    """
    content = make_content(summary, figures, Path(path))
    environment = Environment(
        loader=DictLoader({_TEMPLATE: _text(_TEMPLATE)}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(
        content=content,
        states=STATES,
        metrics=METRICS,
        titles=TITLES,
        style=_text(_STYLE),
        script=_text(_SCRIPT),
        data=data_block(content),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(name: str) -> str:
    return files("cl_merge.benchmarks.reports.html").joinpath(name).read_text(encoding="utf-8")
