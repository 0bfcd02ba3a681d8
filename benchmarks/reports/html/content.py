"""What a page shows, in the order in which it shows it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cl_merge.benchmarks.formatting import counted
from cl_merge.benchmarks.methods.method import METHODS, find_method, grouped_methods
from cl_merge.benchmarks.reports.html.drawn import Drawn, inline_picture, table
from cl_merge.benchmarks.reports.html.entries import Paper, Shown, beside_paper, gap, shown
from cl_merge.benchmarks.reports.html.facts import facts_of
from cl_merge.benchmarks.reports.html.runs import RunFacts, read_runs
from cl_merge.benchmarks.reports.summary import METRICS, Entry, Summary
from cl_merge.benchmarks.suites.definition import Setting
from cl_merge.benchmarks.suites.plan import FAILED, NEW
from cl_merge.errors import InputError


@dataclass(frozen=True)
class Place:
    """A place in the table.

    Attributes:
        id: Its anchor.
        entry: What is known of it.
        shown: Its figures by metric.
        paper: The paper's accuracy beside ours.
        gap: A word for where it has no figure.
        reasons: Why its runs failed.
    """

    id: str
    entry: Entry
    shown: Mapping[str, Shown]
    paper: Paper | None
    gap: str
    reasons: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether it has figures, or a reason for having none."""
        return bool(self.shown or self.reasons)

    @property
    def begun(self) -> bool:
        """Whether there is anything to say of it."""
        return any(cell.state != NEW for cell in self.entry.cells)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        method: Its name.
        about: What it does.
        places: One for each column.
    """

    method: str
    about: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        id: Its anchor.
        title: What stands over it.
        caption: What can be seen in it.
        svg: An element that shows it.
        data: What was drawn, the head first.
    """

    id: str
    title: str
    caption: str
    svg: str
    data: tuple[list[str], ...]


@dataclass(frozen=True)
class Column:
    """A setting: a column of the table, and a section of the page.

    Attributes:
        id: Its anchor.
        name: Its name.
        label: What tells it from others of its data.
        first: Whether it is the first of its data.
        about: What its tasks are, if that is known.
        tasks: Name, and numbers of classes, training and test images, of each task.
        tasks_seed: Whose tasks these are.
        pictures: Its figures.
        runs: Its runs.
    """

    id: str
    name: str
    label: str
    first: bool
    about: str
    tasks: tuple[tuple[str, int, int, int], ...]
    tasks_seed: int | None
    pictures: tuple[Picture, ...]
    runs: tuple[RunFacts, ...]


@dataclass(frozen=True)
class Content:
    """A page.

    Attributes:
        summary: Of the suite.
        facts: What was run, as terms and what they are.
        counts: How many cells are done, failed and so on, by state.
        failures: Runs that failed.
        data: Data sets, each with how many columns it has.
        columns: The settings.
        groups: The rows by group.
        pictures: Figures that show several settings.
        runs: All runs by place.
    """

    summary: Summary
    facts: tuple[tuple[str, str], ...]
    counts: Mapping[str, int]
    failures: tuple[RunFacts, ...]
    data: tuple[tuple[str, int], ...]
    columns: tuple[Column, ...]
    groups: Mapping[str, tuple[Row, ...]]
    pictures: tuple[Picture, ...]
    runs: Mapping[str, RunFacts] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All rows in the order of the table."""
        return [row for own in self.groups.values() for row in own]


def make_content(summary: Summary, figures: Sequence[Drawn], page: Path) -> Content:
    """Put together what a page shows.

    Args:
        summary: Of a suite.
        figures: That were drawn for it.
        page: Where it will be, for the links.

    Returns:
        The content.

    Raises:
        InputError: If a figure is no SVG.
    """
    names = _Names()
    runs = read_runs(summary, page)
    settings = _by_data(summary.suite.settings)
    drawn = _pictures(figures, {s.name for s in settings}, names)
    leaders = {s.data_name: s for s in reversed(settings)}.values()
    columns = tuple(
        _column(s, s in leaders, summary, runs, drawn.get(s.name, ()), names) for s in settings
    )
    return Content(
        summary=summary,
        facts=tuple(facts_of(summary, runs)),
        counts=Counter(cell.state for cell in summary.cells),
        failures=tuple(run for run in runs.values() if run.state == FAILED),
        data=tuple(Counter(s.data_name for s in settings).items()),
        columns=columns,
        groups=_groups(summary, columns, names),
        pictures=drawn.get("", ()),
        runs=runs,
    )


class _Names:
    """Anchors: readable, and each given once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def new(self, *parts: str) -> str:
        words = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
        name = "-".join(filter(None, words)) or "x"
        number, free = 1, name
        while free in self._given:
            number += 1
            free = f"{name}.{number}"
        self._given.add(free)
        return free


def _by_data(settings: Sequence[Setting]) -> list[Setting]:
    """Settings of the same data beside each other, otherwise as they come."""
    first = list(dict.fromkeys(setting.data_name for setting in settings))
    return sorted(settings, key=lambda setting: first.index(setting.data_name))


def _groups(
    summary: Summary, columns: Sequence[Column], names: _Names
) -> Mapping[str, tuple[Row, ...]]:
    figures = {metric: shown(summary, metric) for metric in METRICS}
    methods = list(dict.fromkeys(method for _, method in summary.entries))
    grouped = grouped_methods({method: _training(summary, method) for method in methods})

    def place(setting: str, method: str) -> Place:
        entry = summary.entries[setting, method]
        return Place(
            names.new("at", setting, method),
            entry,
            {
                metric: own[setting, method]
                for metric, own in figures.items()
                if (setting, method) in own
            },
            beside_paper(entry),
            gap(entry),
            tuple(dict.fromkeys(cell.reason for cell in entry.cells if cell.reason)),
        )

    return {
        title: tuple(
            Row(method, _about(method), tuple(place(c.name, method) for c in columns))
            for method in own
        )
        for title, own in grouped.items()
    }


def _training(summary: Summary, method: str) -> str | None:
    if method in METHODS:
        return METHODS[method].training
    own = [e for (_, name), e in summary.entries.items() if name == method]
    return next((cell.cell.job.training for entry in own for cell in entry.cells), None)


def _about(method: str) -> str:
    try:
        return find_method(method).about
    except InputError:
        return ""  # a user's own, known by the place of its file only


def _column(
    setting: Setting,
    first: bool,
    summary: Summary,
    runs: Mapping[str, RunFacts],
    pictures: tuple[Picture, ...],
    names: _Names,
) -> Column:
    cells = [c for (s, _), e in summary.entries.items() if s == setting.name for c in e.cells]
    own = tuple(runs[place] for place in dict.fromkeys(cell.place for cell in cells))
    # Joint training may have counted its images by another number of tasks.
    like = (r for r in own if r.tasks and (not setting.tasks or len(r.tasks) == setting.tasks))
    known = next(like, None)
    tasks = known.tasks if known else []
    number = setting.tasks or len(tasks)
    return Column(
        id=names.new("setting", setting.name),
        name=setting.name,
        label=counted(number, "task") if number else "own tasks",
        first=first,
        about=_about_tasks(known) if known else "",
        tasks=tuple(
            (t["name"], len(t["classes"]), t["train_images"], t["test_images"]) for t in tasks
        ),
        tasks_seed=known.seed if known else None,
        pictures=pictures,
        runs=own,
    )


def _about_tasks(run: RunFacts) -> str:
    classes = {label for task in run.tasks for label in task["classes"]}
    train = sum(task["train_images"] for task in run.tasks)
    test = sum(task["test_images"] for task in run.tasks)
    return (
        f"{run.results['scenario']}-incremental: {counted(len(run.tasks), 'task')}, "
        f"{len(classes)} classes, {train:,} images to train on, {test:,} to test on; "
        f"model {run.results['model']}"
    )


def _pictures(
    figures: Sequence[Drawn], settings: set[str], names: _Names
) -> dict[str, tuple[Picture, ...]]:
    """Figures by setting; those of several settings by nothing."""
    found: dict[str, tuple[Picture, ...]] = {}
    for figure in figures:
        setting = figure.setting if figure.setting in settings else ""
        name = names.new("figure", figure.title)
        svg = inline_picture(figure.file, name, figure.alt)
        data = tuple(table(figure.data.columns, figure.data.rows))
        picture = Picture(name, figure.title, figure.caption, svg, data)
        found[setting] = (*found.get(setting, ()), picture)
    return found
