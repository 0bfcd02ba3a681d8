"""All figures of a suite: measured once, drawn anew each time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cl_merge.benchmarks.reports.figures.consistency import CONSISTENCY
from cl_merge.benchmarks.reports.figures.curve import CURVE
from cl_merge.benchmarks.reports.figures.figure import Figure, Found, Kind, Measured
from cl_merge.benchmarks.reports.figures.matrix import MATRIX
from cl_merge.benchmarks.reports.figures.origins import ORIGINS
from cl_merge.benchmarks.reports.figures.pruning import PRUNING
from cl_merge.benchmarks.reports.figures.runs import (
    Setting,
    SuiteRun,
    check_vectors,
    find_settings,
)
from cl_merge.benchmarks.reports.figures.scale import SCALE
from cl_merge.benchmarks.reports.figures.sign_conflicts import (
    SIGN_CONFLICTS,
    SIGN_CONFLICTS_BY_TASKS,
)
from cl_merge.benchmarks.reports.figures.store import Store
from cl_merge.benchmarks.reports.figures.style import figure_style
from cl_merge.benchmarks.reports.figures.svg import save_png, save_svg
from cl_merge.errors import InputError

if TYPE_CHECKING:
    from cl_merge.benchmarks.reports.figures.figure import Measure
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = (
    CURVE,
    MATRIX,
    PRUNING,
    SCALE,
    SIGN_CONFLICTS,
    CONSISTENCY,
    ORIGINS,
    SIGN_CONFLICTS_BY_TASKS,
)
"""All figures, in the order of a report."""

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, how many images were classified and how many will be."""


def figures_of(
    folder: str | Path,
    settings: Sequence[str] | None = None,
    *,
    evaluate: bool = True,
    progress: Progress | None = None,
) -> list[Figure]:
    """Make the figures of a suite from the runs that have finished.

    What has to be measured is kept in ``analysis/SETTING/KIND-seedN.json``, and measured again only
    once a run's ``results.json`` has changed. The figures are drawn anew each time, the same bytes
    from the same measures.

    Args:
        folder: The suite's.
        settings: Names of its settings; None for all.
        evaluate: Whether to measure what needs the model and its images, which takes minutes. If
            not, the figures are made of what was measured before, and left out if nothing was.
        progress: Told how far the evaluations are.

    Returns:
        The figures, setting by setting in the order of `KINDS`; those of a whole data set stand
        after its last setting. They lie in ``figures/``. A run whose task vectors or images cannot
        be read is left out of figures that need them, with a warning.

    Raises:
        InputError: If there is no such setting.
    """
    folder = Path(folder)
    found = find_settings(folder, settings)
    measures = _measure_all(folder, found, evaluate, progress)
    figures = []
    for data, same in groupby(found, key=lambda setting: setting.data):
        of_data = list(same)
        for setting in of_data:
            for kind in KINDS:
                if not kind.compares:
                    figures += _draw(kind, folder, setting.name, [_of(measures, kind, setting)])
        for kind in KINDS:
            if kind.compares:
                every = [_of(measures, kind, setting) for setting in of_data]
                figures += _draw(kind, folder, data, every)
    return figures


@dataclass(frozen=True)
class _Job:
    """A kind that a run has to be measured for."""

    kind: Kind
    measure: Measure
    setting: Setting
    run: SuiteRun
    store: Store

    @property
    def fresh(self) -> bool:
        return self.store.get(self.run) is not None

    @property
    def images(self) -> int:
        return 0 if self.fresh or self.kind.estimate is None else self.kind.estimate(self.run)

    def __str__(self) -> str:
        return f"{self.kind.name} of {self.setting.name}, seed {self.run.seed}, {self.run.training}"


def _measure_all(
    folder: Path, settings: Sequence[Setting], evaluate: bool, progress: Progress | None
) -> dict[tuple[str, str], dict[str, dict[int, Found]]]:
    """By kind and setting: what each training and seed showed."""
    jobs = [job for setting in settings for job in _jobs(folder, setting)]
    tally = _Tally(sum(job.images for job in jobs) if evaluate else 0, progress)
    measures: dict[tuple[str, str], dict[str, dict[int, Found]]] = {}
    # One model and one set of images at a time, for all that a setting and seed need of it.
    for _, same in groupby(jobs, key=lambda job: (job.setting.name, job.run.seed)):
        replay = _ReplayOnce(tally.add)
        for job in same:
            if not job.fresh and job.kind.evaluates and not evaluate:
                continue
            found = _measure(job, replay, tally)
            if found is not None:
                of_setting = measures.setdefault((job.kind.name, job.setting.name), {})
                of_setting.setdefault(job.run.training, {})[job.run.seed] = found
    return measures


def _jobs(folder: Path, setting: Setting) -> list[_Job]:
    jobs = []
    for seed in sorted({run.seed for run in setting.runs}):
        for kind in KINDS:
            if kind.measure is None:
                continue
            file = folder / "analysis" / setting.name / f"{kind.name}-seed{seed}.json"
            store = Store(file, kind.options)
            jobs += [
                _Job(kind, kind.measure, setting, run, store)
                for run in setting.runs
                if run.seed == seed and kind.wants(run)
            ]
    return jobs


def _measure(job: _Job, replay: _ReplayOnce, tally: _Tally) -> Found | None:
    try:
        if not job.fresh:
            check_vectors(job.run)
            tally.begin(job)
            began = time.monotonic()
            job.store.get_or_make(job.run, lambda: job.measure(job.run, lambda: replay.of(job.run)))
            level = logging.INFO if job.kind.evaluates else logging.DEBUG
            log.log(level, "measured %s in %.1f s", job, time.monotonic() - began)
    except InputError as error:
        log.warning("no %s: %s", job, error)
    found: Found | None = job.store.get(job.run)
    return found


class _ReplayOnce:
    """Loads the model and the images when they are first needed, for all runs of a seed."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._replay: RunEvaluator | None = None

    def of(self, run: SuiteRun) -> RunEvaluator:
        # What was measured before can be drawn without the parts that train and evaluate.
        from cl_merge.benchmarks.runs.evaluator import RunEvaluator

        if self._replay is None:
            self._replay = RunEvaluator.of(run.folder, self._tell)
        self._replay.check_same(run.results)
        return self._replay


class _Tally:
    """Tells how far the evaluations are."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._what = 0, ""
        self._began: float | None = None
        if total:
            log.info("figures: %d images to classify", total)

    def begin(self, job: _Job) -> None:
        self._what = str(job)
        self.add(0)

    def add(self, images: int) -> None:
        self._done += images
        if self._progress is not None and self._total:
            self._progress(self._what, self._done, self._total)


def _of(
    measures: Mapping[tuple[str, str], Mapping[str, Mapping[int, Found]]],
    kind: Kind,
    setting: Setting,
) -> Measured:
    return Measured(setting, measures.get((kind.source or kind.name, setting.name), {}))


def _draw(kind: Kind, folder: Path, name: str, measured: Sequence[Measured]) -> list[Figure]:
    file = folder / "figures" / f"{name}-{kind.name}.svg"
    with figure_style():
        drawn = kind.draw(measured)
        if drawn is None:
            return []
        save_svg(drawn.canvas, file, drawn.title, drawn.alt)
        save_png(drawn.canvas, file.with_suffix(".png"))
    return [Figure(drawn.title, kind.name, name, file, drawn.caption, drawn.alt, drawn.data)]
