"""What a finished figure is, and what a kind of figure has to provide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cl_merge.benchmarks.reports.figures.runs import Setting, SuiteRun
from cl_merge.benchmarks.reports.figures.trainings import PLAIN

if TYPE_CHECKING:
    import matplotlib.figure

    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

    Measure = Callable[[SuiteRun, Callable[[], RunEvaluator]], "Found"]

T = TypeVar("T")

Found = Mapping[str, Any]
"""What one run showed, as plain values that JSON can hold."""


@dataclass(frozen=True)
class Table:
    """The numbers of a figure.

    Attributes:
        columns: Their heads.
        rows: Texts and numbers; None where there is none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A figure on disk.

    Attributes:
        title: One line.
        kind: Which of `KINDS`.
        setting: Name of the setting; of the data set where the figure compares its settings.
        file: The SVG, which takes the colour of the text around it when it is put inside a page; a
            PNG of the same name lies beside it.
        caption: What is drawn and how it was measured.
        alt: What it shows, for those who cannot see it.
        data: Its numbers.
    """

    title: str
    kind: str
    setting: str
    file: Path
    caption: str
    alt: str
    data: Table


@dataclass(frozen=True)
class Drawn:
    """A figure that is not on disk yet.

    Attributes:
        canvas: The picture.
        title: As of `Figure`.
        caption: As of `Figure`.
        alt: As of `Figure`.
        data: As of `Figure`.
    """

    canvas: matplotlib.figure.Figure
    title: str
    caption: str
    alt: str
    data: Table


@dataclass(frozen=True)
class Measured:
    """What was measured of the runs of a setting.

    Attributes:
        setting: The setting.
        found: By training, then by seed.
    """

    setting: Setting
    found: Mapping[str, Mapping[int, Found]]

    def over_seeds(self, training: str) -> list[Found]:
        """What every seed of a training showed, in the order of the seeds.

        Args:
            training: Its name.

        Returns:
            One for each seed; none if the training was not measured.
        """
        found = self.found.get(training, {})
        return [found[seed] for seed in sorted(found)]

    def by_training(self, read: Callable[[list[Found]], T]) -> dict[str, T]:
        """Read something off the measures of each of the plain trainings.

        Args:
            read: Takes what every seed of a training showed.

        Returns:
            What it returns, by training; those that were not measured are left out.
        """
        return {training: read(found) for training in PLAIN if (found := self.over_seeds(training))}


@dataclass(frozen=True)
class Kind:
    """One kind of figure: how runs are measured for it, and how it is drawn.

    Attributes:
        name: As in file names.
        draw: Makes the figure of one or several settings; None if they have nothing to show.
        measure: Measures one run; None for figures that need its results only.
        estimate: How many images `measure` will classify.
        trainings: Which trainings are measured; empty for all that merge.
        options: What the measures depend on besides the run; others make the stored ones stale.
        compares: Whether a figure is of all settings of a data set rather than of one.
        source: Name of the kind whose measures it draws; its own by default.
    """

    name: str
    draw: Callable[[Sequence[Measured]], Drawn | None]
    measure: Measure | None = None
    estimate: Callable[[SuiteRun], int] | None = None
    trainings: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    compares: bool = False
    source: str | None = None

    def wants(self, run: SuiteRun) -> bool:
        """Whether a run is to be measured.

        Args:
            run: The run.

        Returns:
            Whether it is of one of `trainings`, or has a method that merges for the text head
            alone.
        """
        if self.trainings:
            return run.training in self.trainings
        return any(
            result["merger"] and not result.get("statistics")
            for result in run.results["methods"].values()
        )

    @property
    def evaluates(self) -> bool:
        """Whether images are classified for it."""
        return self.estimate is not None
