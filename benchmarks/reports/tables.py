"""The tables of a suite: for the terminal, Markdown, LaTeX, and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.reports.summary import METRICS, Entry, Summary
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, NEW
from cl_merge.errors import unknown_name

_MARKS = {
    "spread": "± standard deviation over seeds",
    "rank": "best merging method bold, second underlined",
    "difference": "in brackets: difference to the paper",
    "seeds": "k of n: only so many seeds have run",
}
_STATES = {DONE: "-", FAILED: "failed", BEGUN: "begun", NEW: ""}


@dataclass(frozen=True)
class Shown:
    """A metric of a method on a setting, in words; empty ones for what is not known."""

    mean: str = ""
    spread: str = ""  # standard deviation over seeds
    seeds: str = ""  # how many of the seeds it is of, such as "1 of 3"; empty if of all
    rank: int | None = None  # 1 or 2 for the best and the second best
    difference: str = ""  # to the paper's accuracy, with its sign
    state: str = DONE  # how far its runs are


Row = tuple[str, str, list[Shown]]
"""Group, method, and what stands in each setting's column."""


def shown(entry: Entry, metric: str) -> Shown:
    """Put a metric of an entry into words."""
    found = entry.metrics.get(metric)
    if found is None:
        states = {cell.state for cell in entry.cells}
        return Shown(state=next(s for s in (DONE, FAILED, BEGUN, NEW) if s in states))
    unit, digits = METRICS[metric].unit, METRICS[metric].digits
    seeds, known, spread = len(entry.cells), len(found.values), found.spread
    compared = metric == "accuracy" and entry.paper is not None
    return Shown(
        rounded(found.mean / unit, digits),
        "" if math.isnan(spread) else rounded(spread / unit, digits),
        "" if known == seeds else f"{known} of {seeds}",
        entry.ranks.get(metric),
        rounded(found.mean - (entry.paper or 0.0), sign="+") if compared else "",
    )


def rows_of(summary: Summary, metric: str) -> Iterator[Row]:
    """Go through the rows of a table."""
    if metric not in METRICS:
        raise unknown_name("metric", metric, list(METRICS))
    for group, methods in summary.groups.items():
        for method in methods:
            entries = [summary.entries[s.name, method] for s in summary.suite.settings]
            yield group, method, [shown(entry, metric) for entry in entries]


def rich_tables(summary: Summary, metric: str = "accuracy", width: int = 80) -> list[Table]:
    """Make the table for a terminal, in as many parts as fit its width in characters."""
    rows = list(rows_of(summary, metric))
    console = Console(width=10_000)  # a measure is at most as wide
    parts: list[list[int]] = [[]]
    for column in range(len(summary.suite.settings)):
        wider = _part(summary, rows, [*parts[-1], column])
        if parts[-1] and console.measure(wider).maximum > width:
            parts.append([])
        parts[-1].append(column)
    return [_part(summary, rows, columns) for columns in parts]


def _part(summary: Summary, rows: Sequence[Row], columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for index in columns:
        setting = summary.suite.settings[index]
        tasks = "" if setting.tasks is None else f"\n{setting.tasks}"
        tasks += "" if setting.order is None else f"\norder {setting.order}"
        table.add_column(escape(setting.data_name + tasks), justify="right", no_wrap=True)
    for group, of_group in groupby(rows, key=itemgetter(0)):
        table.add_section()
        table.add_row(escape(group), style="dim italic")
        for _, method, cells in of_group:
            table.add_row(escape(method), *(_for_terminal(cells[index]) for index in columns))
    return table


def title_of(summary: Summary, metric: str) -> str:
    """The line over a table: suite, metric with its unit, and seeds."""
    seeds = summary.suite.seeds
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    which = f"over orders, {which}" if summary.axis == "orders" else which
    return f"{summary.suite.name}: {METRICS[metric].title} ({which})"


def legend_of(summary: Summary, metric: str) -> str:
    """Explain the metric and the marks that a table has."""
    every = [cell for _, _, cells in rows_of(summary, metric) for cell in cells]
    seen = [said for mark, said in _MARKS.items() if any(getattr(cell, mark) for cell in every)]
    legend = "; ".join([METRICS[metric].about, *seen])
    return legend.replace("seeds", summary.axis)


def markdown(summary: Summary, metric: str = "accuracy") -> str:
    """Write the table as Markdown: the best in bold, the second best in italics."""
    rows = list(rows_of(summary, metric))
    names = [_in_cell(setting.name) for setting in summary.suite.settings]
    lines = [
        f"{title_of(summary, metric)}\n",
        f"| method | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for _, method, cells in rows:
        lines.append(f"| {_in_cell(method)} | {' | '.join(map(_for_markdown, cells))} |")
    legend = legend_of(summary, metric).replace("underlined", "in italics")
    return "\n".join([*lines, "", legend, ""])


def latex(summary: Summary, metric: str = "accuracy") -> str:
    r"""Write the table as LaTeX, for the package ``booktabs``: the second best is underlined."""
    rows = list(rows_of(summary, metric))
    names = [_escaped(setting.name) for setting in summary.suite.settings]
    lines = [
        f"% {title_of(summary, metric)}",
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        rf"method & {' & '.join(names)} \\",
    ]
    for _, of_group in groupby(rows, key=itemgetter(0)):
        lines.append(r"\midrule")
        for _, method, cells in of_group:
            lines.append(rf"{_escaped(method)} & {' & '.join(map(_for_latex, cells))} \\")
    legend = legend_of(summary, metric).replace("%", r"\%")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {legend}", ""])


def csv_text(summary: Summary) -> str:
    """Write every metric as CSV: a line for each setting, method and metric.

    The columns are ``setting, data, tasks, method, metric, mean, std, seeds, paper, difference``
    and then one for each seed; bytes and seconds are as they are.
    """
    seeds = summary.suite.seeds
    file = io.StringIO()
    columns = ["setting", "data", "tasks", "method", "metric", "mean", "std", "seeds", "paper"]
    columns += ["difference", *(f"seed {seed}" for seed in seeds)]
    out = csv.DictWriter(file, columns, lineterminator="\n")
    out.writeheader()
    for (setting, method), entry in summary.entries.items():
        for metric, found in entry.metrics.items():
            line = {"setting": setting, "data": entry.setting.data, "tasks": entry.setting.tasks}
            line |= {"method": method, "metric": metric, "seeds": len(found.values)}
            numbers = {"mean": found.mean, "std": found.spread}
            numbers |= {f"seed {seed}": value for seed, value in found.values.items()}
            if metric == "accuracy" and entry.paper is not None:
                numbers |= {"paper": entry.paper, "difference": found.mean - entry.paper}
            exact = {key: repr(value) for key, value in numbers.items() if not math.isnan(value)}
            out.writerow(line | exact)
    return file.getvalue()


def _plain(cell: Shown, mark: str = "{}", spread: str = " ± ", quiet: str = "{}") -> str:
    """A cell as text, with what marks its mean and what says the rest in a low voice."""
    if not cell.mean:
        return _STATES[cell.state]
    note = ", ".join(filter(None, (cell.difference, cell.seeds)))
    text = mark.format(cell.mean) + (spread + cell.spread if cell.spread else "")
    return text + (quiet.format(f" ({note})") if note else "")


def _for_markdown(cell: Shown) -> str:
    mark = {1: "**", 2: "*"}.get(cell.rank or 0, "")
    return f"{mark}{_plain(cell)}{mark}"


def _for_terminal(cell: Shown) -> str:
    if not cell.mean:
        return f"[{'red' if cell.state == FAILED else 'dim'}]{_STATES[cell.state]}[/]"
    style = {1: "bold", 2: "underline"}.get(cell.rank or 0, "default")
    return _plain(cell, f"[{style}]{{}}", quiet="[/][dim]{}[/]")


def _for_latex(cell: Shown) -> str:
    if not cell.mean:
        return "--" if cell.state in (DONE, NEW) else _STATES[cell.state]
    mark = {1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}.get(cell.rank or 0, "{}")
    return _plain(cell, mark, r" $\pm$ ")


def _in_cell(text: str) -> str:
    """A name in a table of Markdown."""
    return text.replace("|", r"\|")


def _escaped(text: str) -> str:
    """A name in LaTeX."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(rf"\{c}" if c in "&%$#_{}" else words.get(c, c) for c in text)
