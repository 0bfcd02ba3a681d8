"""All figures of a suite: measured once, drawn anew each time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.reports.figures.accuracy import CURVE, MATRIX
from cl_merge.benchmarks.reports.figures.evaluated import PRUNING, SCALE
from cl_merge.benchmarks.reports.figures.figure import Drawing, Kind, Measure, Measured
from cl_merge.benchmarks.reports.figures.style import figure_style, save_drawing
from cl_merge.benchmarks.reports.figures.suite_runs import SettingRuns, SuiteRun, find_settings
from cl_merge.benchmarks.reports.figures.task_vectors import (
    CONSISTENCY,
    ORIGINS,
    SIGN_CONFLICTS,
    SIGN_CONFLICTS_BY_TASKS,
)
from cl_merge.benchmarks.runs.results import as_json, read_json
from cl_merge.errors import InputError
from cl_merge.storage.files import atomic_write

if TYPE_CHECKING:
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
"""Called with what is being measured, how many measurements are done and how many there are."""


def figures_of(
    folder: str | Path,
    *,
    evaluate: bool = True,
    progress: Progress = lambda *_: None,
) -> list[Drawing]:
    """Make the figures of a suite from the runs that have finished.

    What has to be measured is kept in ``analysis/SETTING/KIND-seedN.json``, and measured again only
    once a run's ``results.json`` has changed. The figures are drawn anew each time, the same bytes
    from the same measures, and lie in ``figures/``. Those of a whole data set stand after its last
    setting.

    Without `evaluate`, what needs the model and its images, and takes minutes, is drawn only if it
    was measured before. A run that cannot be read is left out with a warning.
    """
    folder = Path(folder)
    found = find_settings(folder)
    measured = {(k.name, s.name): Measured(s) for k in KINDS for s in found}
    _measure_all(folder, found, measured, evaluate, progress)
    figures = []
    for data, same in groupby(found, key=lambda setting: setting.data):
        of_data = list(same)
        groups = [(setting.name, [setting], False) for setting in of_data]
        for name, shown, compares in [*groups, (data, of_data, True)]:
            for kind in KINDS:
                if kind.compares == compares:
                    own = [measured[kind.source or kind.name, setting.name] for setting in shown]
                    figures += _draw(kind, folder, name, own)
    return figures


def _draw(kind: Kind, folder: Path, name: str, measured: Sequence[Measured]) -> list[Drawing]:
    with figure_style():
        drawn = kind.draw(*measured)
        if drawn is None:
            return []
        file = folder / "figures" / f"{name}-{kind.name}.svg"
        svg = save_drawing(drawn.canvas, file, drawn.title)
    return [replace(drawn, kind=kind.name, setting=name, svg=svg)]


@dataclass(frozen=True)
class _Measurement:
    """A kind that a run has to be measured for, and the folder that keeps what was measured."""

    kind: Kind
    measure: Measure
    setting: str
    run: SuiteRun
    folder: Path

    @property
    def file(self) -> Path:
        """Where it is kept, with the other trainings of the seed."""
        return self.folder / f"{self.kind.name}-seed{self.run.seed}.json"

    def __str__(self) -> str:
        return f"{self.kind.name} of {self.setting}, seed {self.run.seed}, {self.run.training}"

    def stored(self) -> Any:
        """What was measured before; None if nothing was, or it is stale."""
        kept = self._kept().get(self.run.training, {})
        return kept.get("found") if kept.get("results") == self.run.fingerprint else None

    def store(self, found: Any) -> None:
        """Keep what was measured, beside that of other trainings."""
        of_run = {"results": self.run.fingerprint, "found": as_json(found)}
        trainings = {**self._kept(), self.run.training: of_run}
        content = {"options": as_json(self.kind.options), "trainings": trainings}
        with atomic_write(self.file) as temporary:
            text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def _kept(self) -> dict[str, Any]:
        content = read_json(self.file) or {}
        same = content.get("options") == as_json(self.kind.options)
        kept: dict[str, Any] = content["trainings"] if same else {}
        return kept


def _measure_all(
    folder: Path,
    settings: Sequence[SettingRuns],
    measured: dict[tuple[str, str], Measured],
    evaluate: bool,
    progress: Progress,
) -> None:
    """Fill in by kind and setting what each training and seed showed."""
    every = [
        _Measurement(kind, kind.measure, setting.name, run, folder / "analysis" / setting.name)
        for setting in settings
        for seed in dict.fromkeys(run.seed for run in setting.runs)
        for kind in KINDS
        for run in setting.runs
        if kind.measure is not None and run.seed == seed and kind.wants(run)
    ]
    if not evaluate:
        every = [one for one in every if not one.kind.evaluates or one.stored()]
    # One model and one set of images at a time, for all that a setting and seed need of it.
    loaded: dict[tuple[str, int], RunEvaluator] = {}
    for done, one in enumerate(every):
        progress(str(one), done, len(every))
        found = _measure(one, loaded)
        if found is not None:
            of_setting = measured[one.kind.name, one.setting].found
            of_setting.setdefault(one.run.training, {})[one.run.seed] = found
    progress("figures", len(every), len(every))


def _measure(one: _Measurement, loaded: dict[tuple[str, int], RunEvaluator]) -> Any:
    """What a run shows, measured now if it was not before; None if it cannot be."""
    if (found := one.stored()) is not None:
        return found
    try:
        one.run.check_vectors()
        began = time.monotonic()
        one.store(one.measure(one.run, lambda: _evaluator(one, loaded)))
    except InputError as error:
        log.warning("no %s: %s", one, error)
        return None
    level = logging.INFO if one.kind.evaluates else logging.DEBUG
    log.log(level, "measured %s in %.1f s", one, time.monotonic() - began)
    return one.stored()


def _evaluator(one: _Measurement, loaded: dict[tuple[str, int], RunEvaluator]) -> RunEvaluator:
    """The model and the images of a setting and seed, loaded when they are first needed."""
    # What was measured before can be drawn without the parts that train and evaluate.
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

    key = one.setting, one.run.seed
    if key not in loaded:
        loaded.clear()
        loaded[key] = RunEvaluator.of(one.run.folder)
    loaded[key].check_same(one.run.results)
    return loaded[key]
