"""What a kind of figure has to provide, and what a drawn figure is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cl_merge.benchmarks.reports.figures.suite_runs import SettingRuns, SuiteRun

if TYPE_CHECKING:
    import matplotlib.figure

    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

T = TypeVar("T")

Measures = Mapping[str, Any]
"""What one run showed, as plain values that JSON can hold."""

Measure = Callable[[SuiteRun, Callable[[], "RunEvaluator"]], Measures]
"""Measures a run, with what loads its model and images."""

PLAIN = ("sequential", "independent")
"""The trainings that the paper compares, in the order of legends."""


@dataclass(frozen=True)
class Drawing:
    """A figure with what it says in words and numbers; it equals another that says the same."""

    canvas: matplotlib.figure.Figure = field(compare=False, repr=False)
    title: str
    caption: str  # what is drawn and how it was measured
    # Its numbers as a table, which says the same to those who cannot see it.
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    kind: str = ""
    setting: str = ""  # its name; that of the data set where the figure compares its settings
    svg: str = field(default="", repr=False)  # an element for the inside of a page


@dataclass(frozen=True)
class Measured:
    """What was measured of the runs of a setting: by training, then by seed."""

    setting: SettingRuns
    found: dict[str, dict[int, Measures]] = field(default_factory=dict)

    def over_seeds(self, training: str) -> list[Measures]:
        """What each seed of a training showed, in the order of the seeds."""
        found = self.found.get(training, {})
        return [found[seed] for seed in sorted(found)]

    def by_training(self, read: Callable[[list[Measures]], T]) -> dict[str, T]:
        """Read something off the measures of each of the plain trainings that has some."""
        return {training: read(found) for training in PLAIN if (found := self.over_seeds(training))}


@dataclass(frozen=True)
class Kind:
    """One kind of figure: how runs are measured for it, and how it is drawn."""

    name: str  # as in file names
    # Takes what was measured of a setting, or of each setting of a data set if it compares them;
    # None if there is nothing to show.
    draw: Callable[..., Drawing | None]
    # None if the results of its runs are enough.
    measure: Measure | None = None
    evaluates: bool = False  # whether that needs the model and its images
    trainings: tuple[str, ...] = PLAIN  # which are measured; none for all that merge
    options: Mapping[str, Any] = field(default_factory=dict)  # others make the measures stale
    compares: bool = False
    source: str = ""  # the kind whose measures it draws, if not its own

    def wants(self, run: SuiteRun) -> bool:
        """Whether a run is to be measured."""
        return run.training in self.trainings if self.trainings else bool(run.merging)
