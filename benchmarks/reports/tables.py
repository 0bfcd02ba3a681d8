"""The tables of a suite: for the terminal, Markdown, LaTeX, and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.methods.method import grouped_methods
from cl_merge.benchmarks.reports.summary import METRICS, Entry, Figure, Summary
from cl_merge.benchmarks.suites.definition import Setting
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED
from cl_merge.errors import unknown_name

TITLES: dict[str, str] = {
    "accuracy": "accuracy, %",
    "average_accuracy": "macro average accuracy, %",
    "task_aware_accuracy": "task-aware accuracy, %",
    "average_incremental_accuracy": "average incremental accuracy, %",
    "forgetting": "forgetting, points",
    "backward_transfer": "backward transfer, points",
    "forward_transfer": "forward transfer, points",
    "seconds": "time, minutes",
    "peak_memory": "peak memory, GiB",
    "stored_bytes": "stored, MB",
}
"""What each metric is called over a table, with its unit."""

UNITS = {"seconds": 60.0, "peak_memory": 2.0**30, "stored_bytes": 1e6}
"""What a figure is divided by to be in the unit of its title, where that is not 1."""

_STATES = {FAILED: "failed", BEGUN: "begun"}


@dataclass(frozen=True)
class Text:
    """What stands in one place of a table.

    Attributes:
        mean: The figure, rounded; empty if there is none.
        spread: Its standard deviation over seeds; empty for fewer than two.
        seeds: How many of the seeds it is of, such as ``"1 of 3"``; empty if of all.
        rank: 1 or 2 for the best and the second best.
        difference: To the paper's figure, with its sign; empty if there is none.
        state: What to say where there is no figure.
    """

    mean: str
    spread: str
    seeds: str
    rank: int | None
    difference: str
    state: str


def rows_of(summary: Summary, metric: str) -> Iterator[tuple[str, str, list[Text]]]:
    """Go through the rows of a table.

    Args:
        summary: Of a suite.
        metric: One of `METRICS`.

    Yields:
        Group, method, and a text for each setting.

    Raises:
        InputError: If there is no such metric.
    """
    if metric not in METRICS:
        raise unknown_name("metric", metric, list(METRICS))
    trainings = {method.name: method.training for method in summary.suite.rows}
    for group, methods in grouped_methods(trainings).items():
        for method in methods:
            entries = [summary.entries[s.name, method] for s in summary.suite.settings]
            yield group, method, [_text(entry, metric) for entry in entries]


def rich_tables(summary: Summary, metric: str = "accuracy", width: int = 80) -> list[Table]:
    """Make the table for a terminal, in as many parts as fit its width.

    Args:
        summary: Of a suite.
        metric: One of `METRICS`.
        width: Of the terminal, in characters.

    Returns:
        The parts, each with some of the settings.

    Raises:
        InputError: If there is no such metric.
    """
    rows = list(rows_of(summary, metric))
    names = [_heading(setting) for setting in summary.suite.settings]
    edges, gap = 2, 3  # characters that the box and the padding take
    first = max(max(len(group), len(method)) for group, method, _ in rows)
    room = width - edges - first - gap
    columns: list[list[int]] = [[]]
    left = room
    for index, name in enumerate(names):
        shown = [len(_plain(texts[index])) for _, _, texts in rows]
        needed = gap + max(*map(len, name.split("\n")), *shown)
        if needed > left and columns[-1]:
            columns.append([])
            left = room
        columns[-1].append(index)
        left -= needed
    return [_part(rows, names, chosen) for chosen in columns]


def _part(
    rows: list[tuple[str, str, list[Text]]], names: Sequence[str], columns: Sequence[int]
) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for index in columns:
        table.add_column(escape(names[index]), justify="right", no_wrap=True)
    last = None
    for group, method, texts in rows:
        if group != last:
            table.add_section()
            table.add_row(escape(group), style="dim italic")
            last = group
        table.add_row(escape(method), *(_for_terminal(texts[index]) for index in columns))
    return table


def _heading(setting: Setting) -> str:
    return setting.data_name if setting.tasks is None else f"{setting.data_name}\n{setting.tasks}"


def title_of(summary: Summary, metric: str) -> str:
    """Make the line over a table.

    Args:
        summary: Of a suite.
        metric: One of `METRICS`.

    Returns:
        Suite, metric with its unit, and seeds.
    """
    seeds = summary.suite.seeds
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return f"{summary.suite.name}: {TITLES[metric]} ({which})"


def legend_of(summary: Summary, metric: str) -> str:
    """Explain what stands in a table.

    Args:
        summary: Of a suite.
        metric: One of `METRICS`.

    Returns:
        The metric, and the marks that the table has.

    Raises:
        InputError: If there is no such metric.
    """
    texts = [text for _, _, shown in rows_of(summary, metric) for text in shown]
    parts = [f"{METRICS[metric]}"]
    if any(text.spread for text in texts):
        parts.append("± standard deviation over seeds")
    if any(text.rank for text in texts):
        parts.append("best merging method bold, second underlined")
    if any(text.difference for text in texts):
        parts.append("in brackets: difference to the paper")
    if any(text.seeds for text in texts):
        parts.append("k of n: only so many seeds have run")
    return "; ".join(parts)


def markdown(summary: Summary, metric: str = "accuracy") -> str:
    """Write the table as Markdown.

    Args:
        summary: Of a suite.
        metric: One of `METRICS`.

    Returns:
        The text: the best in bold, the second best in italics.

    Raises:
        InputError: If there is no such metric.
    """
    rows = list(rows_of(summary, metric))
    names = [setting.name for setting in summary.suite.settings]
    lines = [
        f"{title_of(summary, metric)}\n",
        f"| method | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for _, method, texts in rows:
        shown = []
        for text in texts:
            mark = {1: "**", 2: "*"}.get(text.rank or 0, "")
            shown.append(f"{mark}{_plain(text)}{mark}")
        lines.append(f"| {method} | {' | '.join(shown)} |")
    legend = legend_of(summary, metric).replace("underlined", "in italics")
    return "\n".join([*lines, "", legend, ""])


def latex(summary: Summary, metric: str = "accuracy") -> str:
    r"""Write the table as LaTeX, for the package ``booktabs``.

    Args:
        summary: Of a suite.
        metric: One of `METRICS`.

    Returns:
        A ``tabular``: the best in bold, the second best underlined.

    Raises:
        InputError: If there is no such metric.
    """
    rows = list(rows_of(summary, metric))
    names = [_escaped(setting.name) for setting in summary.suite.settings]
    lines = [
        f"% {title_of(summary, metric)}",
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        rf"method & {' & '.join(names)} \\",
    ]
    last = None
    for group, method, texts in rows:
        if group != last:
            lines.append(r"\midrule")
            last = group
        shown = " & ".join(_for_latex(text) for text in texts)
        lines.append(rf"{_escaped(method)} & {shown} \\")
    legend = legend_of(summary, metric).replace("%", r"\%")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {legend}", ""])


def csv_text(summary: Summary) -> str:
    """Write all figures as CSV: a line for each setting, method and metric.

    Args:
        summary: Of a suite.

    Returns:
        The text, with columns ``setting, data, tasks, method, metric, mean, std, seeds, paper,
        difference`` and then a column for each seed; bytes and seconds as they are.
    """
    seeds = summary.suite.seeds
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    columns = ("setting", "data", "tasks", "method", "metric", "mean", "std", "seeds")
    out.writerow([*columns, "paper", "difference", *(f"seed {seed}" for seed in seeds)])
    for (name, method), entry in summary.entries.items():
        for metric, figure in entry.figures.items():
            paper = entry.paper if metric == "accuracy" else None
            out.writerow(
                [
                    name,
                    entry.setting.data,
                    "" if entry.setting.tasks is None else entry.setting.tasks,
                    method,
                    metric,
                    _exact(figure.mean),
                    _exact(figure.spread),
                    len(figure.values),
                    "" if paper is None else paper,
                    "" if paper is None else _exact(figure.mean - paper),
                    *(_exact(figure.values.get(seed, math.nan)) for seed in seeds),
                ]
            )
    return file.getvalue()


def _text(entry: Entry, metric: str) -> Text:
    figure = entry.figures.get(metric)
    if figure is None:
        states = {cell.state for cell in entry.cells}
        state = next((text for state, text in _STATES.items() if state in states), "")
        return Text("", "", "", None, "", "-" if states == {DONE} else state)
    unit = UNITS.get(metric, 1.0)
    digits = 0 if metric == "stored_bytes" else 1
    difference = ""
    if metric == "accuracy" and entry.paper is not None:
        difference = rounded(figure.mean - entry.paper, sign="+")
    return Text(
        rounded(figure.mean / unit, digits),
        _spread(figure, unit, digits),
        ""
        if len(figure.values) == len(entry.cells)
        else f"{len(figure.values)} of {len(entry.cells)}",
        entry.rank if metric == "accuracy" else None,
        difference,
        "",
    )


def _spread(figure: Figure, unit: float, digits: int) -> str:
    return "" if math.isnan(figure.spread) else rounded(figure.spread / unit, digits)


def _plain(text: Text) -> str:
    spread = f" ± {text.spread}" if text.spread else ""
    return f"{text.mean}{spread}{_aside(text)}" if text.mean else text.state


def _aside(text: Text) -> str:
    said = ", ".join(filter(None, (text.difference, text.seeds)))
    return f" ({said})" if said else ""


def _for_terminal(text: Text) -> str:
    if not text.mean:
        return f"[red]{text.state}[/]" if text.state == "failed" else f"[dim]{text.state}[/]"
    mark = {1: "bold", 2: "underline"}.get(text.rank or 0)
    shown = f"{text.mean} ± {text.spread}" if text.spread else text.mean
    shown = f"[{mark}]{shown}[/]" if mark else shown
    return f"{shown}[dim]{_aside(text)}[/]"


def _for_latex(text: Text) -> str:
    if not text.mean:
        return text.state or "--"
    spread = rf" $\pm$ {text.spread}" if text.spread else ""
    mark = {1: r"\textbf", 2: r"\underline"}.get(text.rank or 0)
    shown = f"{mark}{{{text.mean}}}{spread}" if mark else f"{text.mean}{spread}"
    return f"{shown}{_aside(text)}"


def _escaped(text: str) -> str:
    return "".join(rf"\{c}" if c in "&%$#_{}" else c for c in text)


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)
