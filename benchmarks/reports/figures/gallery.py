"""All figures of a suite: measured once, drawn anew each time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.reports.figures import accuracy, evaluated, task_vectors
from cl_merge.benchmarks.reports.figures.style import Drawing, figure_style, save_drawing
from cl_merge.benchmarks.reports.figures.suite_runs import (
    PLAIN,
    Measured,
    Measures,
    SettingRuns,
    SuiteRun,
    find_settings,
)
from cl_merge.benchmarks.runs.results import as_json, read_json
from cl_merge.errors import InputError
from cl_merge.storage.files import atomic_write

if TYPE_CHECKING:
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """One kind of figure: how runs are measured for it, and how it is drawn."""

    name: str  # as in file names
    # Takes what was measured of a setting; None if there is nothing to show.
    draw: Callable[..., Drawing | None]
    # Measures a run, with what loads its model and images; None if its results are enough.
    measure: Callable[[SuiteRun, Callable[[], RunEvaluator]], Measures] | None = None
    evaluates: bool = False  # whether that needs the model and its images
    merging: bool = False  # whether it measures all runs that merge, not just the plain trainings
    options: Mapping[str, Any] = field(default_factory=dict)  # others make the measures stale
    compares: str = ""  # the kind whose measures it draws, of every setting of a data set

    def wants(self, run: SuiteRun) -> bool:
        """Whether a run is to be measured."""
        if self.measure is None:
            return False
        return bool(run.merging) if self.merging else run.training in PLAIN


KINDS: tuple[Kind, ...] = (
    Kind("curve", accuracy.draw_curve),
    Kind("matrix", accuracy.draw_matrix),
    Kind(
        "pruning",
        evaluated.draw_pruning,
        evaluated.measure_pruning,
        evaluates=True,
        options={"shares": evaluated.SHARES},
    ),
    Kind(
        "scale",
        evaluated.draw_scale,
        evaluated.measure_scale,
        evaluates=True,
        merging=True,
        options={"scales": evaluated.SCALES},
    ),
    Kind(
        "sign-conflicts",
        task_vectors.draw_conflicts_over_time,
        task_vectors.measure_sign_conflicts,
        options={"density": task_vectors.DENSITY},
    ),
    Kind(
        "consistency",
        task_vectors.draw_consistency,
        task_vectors.measure_consistency,
        options={"bins": task_vectors.BINS},
    ),
    Kind("origins", task_vectors.draw_origins, task_vectors.measure_origins),
    Kind(
        "sign-conflicts-by-tasks",
        task_vectors.draw_conflicts_over_settings,
        compares="sign-conflicts",
    ),
)
"""All figures, in the order of a report."""


def figures_of(
    folder: str | Path,
    *,
    evaluate: bool = True,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Drawing]:
    """Make the figures of a suite from the runs that have finished.

    What has to be measured is kept in ``analysis/SETTING/KIND-seedN.json``, and measured again only
    once a run's ``results.json`` has changed. The figures are drawn anew each time, the same bytes
    from the same measures, and lie in ``figures/``. Those of a whole data set stand after its last
    setting.

    Without `evaluate`, what needs the model and its images, and takes minutes, is drawn only if it
    was measured before. A run that cannot be read is left out with a warning. `progress` is called
    with what is being measured, how many measurements are done and how many there are.
    """
    folder = Path(folder)
    settings = find_settings(folder)
    measured = _measure_all(folder, settings, evaluate, progress)
    figures = []
    for data, same in groupby(settings, key=lambda setting: setting.data):
        of_data = list(same)
        groups = [(setting.name, [setting], False) for setting in of_data]
        for name, shown, compares in [*groups, (data, of_data, True)]:
            for kind in KINDS:
                if bool(kind.compares) == compares:
                    own = [measured[kind.compares or kind.name, setting.name] for setting in shown]
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
    """A kind that a run has to be measured for, and the file that keeps what was measured."""

    kind: Kind
    setting: str
    run: SuiteRun
    file: Path  # has the other trainings of the seed, too

    def __str__(self) -> str:
        return f"{self.kind.name} of {self.setting}, seed {self.run.seed}, {self.run.training}"

    def stored(self) -> Any:
        """What was measured before; None if nothing was, or it is stale."""
        kept = self._kept().get(self.run.training, {})
        return kept.get("found") if kept.get("results") == self.run.fingerprint else None

    def store(self, found: Measures) -> None:
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
    evaluate: bool,
    progress: Callable[[str, int, int], None],
) -> dict[tuple[str, str], Measured]:
    """What the runs showed, by kind and setting."""
    kept = folder / "analysis"
    every = [
        _Measurement(kind, setting.name, run, kept / setting.name / f"{kind.name}-seed{seed}.json")
        for setting in settings
        for seed in dict.fromkeys(run.seed for run in setting.runs)
        for kind in KINDS
        for run in setting.runs
        if run.seed == seed and kind.wants(run)
    ]
    if not evaluate:
        every = [one for one in every if not one.kind.evaluates or one.stored()]
    measured = {(k.name, s.name): Measured(s) for k in KINDS for s in settings}
    # One model and one set of images at a time, for all that a setting and seed need of it.
    loaded: dict[tuple[str, int], RunEvaluator] = {}
    for done, one in enumerate(every):
        progress(str(one), done, len(every))
        found = _measure(one, loaded)
        if found is not None:
            own = measured[one.kind.name, one.setting].found
            own.setdefault(one.run.training, []).append(found)
    progress("figures", len(every), len(every))
    return measured


def _measure(one: _Measurement, loaded: dict[tuple[str, int], RunEvaluator]) -> Any:
    """What a run shows, measured now if it was not before; None if it cannot be."""
    found = one.stored()
    if found is None and one.kind.measure is not None:
        try:
            one.run.check_vectors()
            began = time.monotonic()
            one.store(one.kind.measure(one.run, lambda: _evaluator(one, loaded)))
        except InputError as error:
            log.warning("no %s: %s", one, error)
            return None
        level = logging.INFO if one.kind.evaluates else logging.DEBUG
        log.log(level, "measured %s in %.1f s", one, time.monotonic() - began)
        found = one.stored()
    return found


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
