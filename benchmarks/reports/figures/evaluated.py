"""Figures that need the model once more: pruned task vectors, and the scale of the merge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.analysis import KEPT, keep
from cl_merge.benchmarks.methods.method import find_method
from cl_merge.benchmarks.reports.figures.figure import Drawing, Kind, Measured, Measures
from cl_merge.benchmarks.reports.figures.style import (
    DASHED,
    DOTTED,
    GREY,
    INK,
    Line,
    draw_line,
    legend_beside,
    look_of,
    number,
    over_seeds,
    seeds_note,
    stacked_panels,
)
from cl_merge.benchmarks.reports.figures.suite_runs import SuiteRun, in_table_order
from cl_merge.config.reading import read_config
from cl_merge.task_vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

log = logging.getLogger(__name__)

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the parameters that pruning keeps; all of them come on top."""

_KEPT_LOOKS = {
    which: look_of(merger, None) | {"linestyle": "-"}
    for which, merger in (("highest", "magmax"), ("random", "random-mix"), ("lowest", "average"))
}


def measure_pruning(run: SuiteRun, get_evaluator: Callable[[], RunEvaluator]) -> Measures:
    """Prune the task vector of each task, and evaluate on the task's test images.

    Accuracies are in per cent among the task's classes: ``kept`` by choice of entries, task and
    share of `SHARES`, ``whole`` of unpruned task vectors, and ``zero_shot``.
    """
    evaluator = get_evaluator()
    kept: dict[str, list[list[float]]] = {which: [] for which in KEPT}
    unpruned = []
    for task, vector in enumerate(run.vectors()):
        unpruned.append(_accuracy(evaluator, vector, task))
        for which, of_tasks in kept.items():
            of_tasks.append(
                [_accuracy(evaluator, keep(vector, share, which), task) for share in SHARES]
            )
        del vector
    zero_shot = run.results["methods"]["zero-shot"]["matrix_task_aware"][0]
    return {"kept": kept, "whole": unpruned, "zero_shot": zero_shot}


def draw_pruning(measured: Measured) -> Drawing | None:
    """Draw accuracy against the share of a task vector that is kept, the mean over tasks."""
    lines = measured.by_training(_pruned_lines)
    if not lines:
        return None
    canvas, panels = stacked_panels([f"{training} training" for training in lines], 2.25)
    x = [100 * share for share in (*SHARES, 1.0)]
    for axes, (choices, zero_shot) in zip(panels.values(), lines.values(), strict=True):
        unpruned = choices["highest"].mean[-1]
        axes.axhline(unpruned, color=GREY, linestyle=DASHED, label="unpruned", linewidth=1.2)
        for which, look in _KEPT_LOOKS.items():
            draw_line(axes, x, choices[which], which, **look)
        axes.axhline(zero_shot, color=GREY, linestyle=DOTTED, label="zero-shot")
        legend_beside(axes)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlabel("share of the task vector kept, %")
    canvas.supylabel("accuracy on the task, %")
    seeds = max(choices["highest"].seeds for choices, _ in lines.values())
    rows: list[tuple[str | float | None, ...]] = []
    for training, (choices, zero_shot) in lines.items():
        rows += [(training, w, *map(number, line.mean)) for w, line in choices.items()]
        rows.append((training, "none (zero-shot)", *[number(zero_shot)] * len(x)))
    return Drawing(
        canvas,
        f"Pruned task vectors on {measured.setting.title}",
        "Pre-trained weights plus one task vector of which only the parameters of highest or "
        "lowest magnitude, or random ones, are kept; accuracy on the test images of that task, "
        f"among its own classes, as the mean over tasks. {seeds_note(seeds)}",
        ("training", "kept", *(f"{value:g} %" for value in x)),
        tuple(rows),
    )


PRUNING = Kind("pruning", draw_pruning, measure_pruning, evaluates=True, options={"shares": SHARES})


def _accuracy(evaluator: RunEvaluator, vector: TaskVector, task: int) -> float:
    _, aware, total = evaluator.counts(vector.items(), 1.0, task)[:, task].tolist()
    return 100.0 * aware / total if total else float("nan")


def _pruned_lines(every: Sequence[Measures]) -> tuple[dict[str, Line], float]:
    """By choice the accuracy at each share and without pruning; that of zero-shot."""
    choices = {}
    for which in _KEPT_LOOKS:
        seeds = []
        for found in every:
            by_task = np.array(found["kept"][which], dtype=float)  # [T, shares]
            unpruned = np.array(found["whole"], dtype=float)
            seeds.append([*np.nanmean(by_task, axis=0), np.nanmean(unpruned)])
        choices[which] = over_seeds(seeds)
    zero_shot = [np.nanmean(np.array(found["zero_shot"], dtype=float)) for found in every]
    return choices, float(np.mean(zero_shot))


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""At which every merger is evaluated, as well as at its own."""


def measure_scale(run: SuiteRun, get_evaluator: Callable[[], RunEvaluator]) -> Measures:
    """Merge a run's task vectors with each of its methods, and evaluate several scales.

    ``own`` is the scale that the method was run with, None if it had several.
    """
    from cl_merge.benchmarks.runs.run import make_merger  # brings the parts that train

    evaluator, found = get_evaluator(), {}
    config = read_config([], {}, run.folder / "config.yaml")
    for name, result in run.merging.items():
        method = find_method(name)
        if method.weighted:
            log.info("%s: '%s' needs more than task vectors, and is left out", run.folder, name)
            continue
        merger, _ = make_merger(config, method)
        for vector in run.vectors():
            merger.update(vector)
            del vector
        merged = merger.merged()
        known = _known_accuracies(run, result)
        scales = sorted({*SCALES, *known})
        accuracy = [
            known[scale] if scale in known else evaluator.accuracy(merged.items(), scale)
            for scale in scales
        ]
        found[name] = {
            "merger": result["merger"],
            "scales": scales,
            "accuracy": accuracy,
            "own": next((scale for scale in known if scale), None),
        }
    return {"methods": found}


def draw_scale(measured: Measured) -> Drawing | None:
    """Draw accuracy against the scale of the merged task vector."""
    lines = _scale_lines(measured)
    if not lines:
        return None
    titles = {
        name: f"{'independent' if own.training == 'independent' else 'sequential'} training"
        for name, own in lines.items()
    }
    canvas, panels = stacked_panels(dict.fromkeys(titles.values()), 2.25)
    for name, own in lines.items():
        axes, label = panels[titles[name]], name.removesuffix("-sequential")
        look = look_of(own.merger, own.training) | {"markersize": 2.5}
        draw_line(axes, own.scales, own.line, label, **look)
        if own.scale is not None and own.accuracy is not None:
            large = {**look, "markersize": 8, "linestyle": "", "markeredgewidth": 0.8}
            axes.plot(own.scale, own.accuracy, **large, markeredgecolor=INK, zorder=5)
    for title, axes in panels.items():
        zero = next(own.line.mean[0] for name, own in lines.items() if titles[name] == title)
        axes.axhline(zero, color=GREY, linestyle=DOTTED, label="zero-shot")
        legend_beside(axes)
    axes.set_xlabel("scale of the merged task vector")
    canvas.supylabel("accuracy after the last task, %")
    seeds = max(own.line.seeds for own in lines.values())
    rows = []
    for name, own in lines.items():
        at = [number(own.line.mean[own.scales.index(scale)]) for scale in SCALES]
        rows.append((name, own.scale, own.accuracy and number(own.accuracy), *at))
    return Drawing(
        canvas,
        f"Scale of the merge on {measured.setting.title}",
        "Accuracy on all test images among all classes, after the last task. Large markers: the "
        "scale that each method was run with. This is an analysis on test images, and not a way to "
        f"choose a scale: that needs images that are not tested on. {seeds_note(seeds)}",
        ("method", "own scale", "at its own", *(f"at {scale:g}" for scale in SCALES)),
        tuple(rows),
    )


SCALE = Kind(
    "scale",
    draw_scale,
    measure_scale,
    evaluates=True,
    trainings=(),
    options={"scales": SCALES},
)


@dataclass(frozen=True)
class _ScaleLine:
    """A method's accuracy by scale, and the scale that it was run with."""

    training: str
    merger: str
    scales: list[float]
    line: Line
    scale: float | None  # None if it had several

    @property
    def accuracy(self) -> float | None:
        """At the method's own scale, if that is known."""
        if self.scale is None or self.scale not in self.scales:
            return None
        return float(self.line.mean[self.scales.index(self.scale)])


def _known_accuracies(run: SuiteRun, result: Mapping[str, Any]) -> dict[float, float]:
    """What the run itself has evaluated: nothing of the merge, and the method's own scale."""
    known = {0.0: float(run.results["methods"]["zero-shot"]["accuracy"])}
    if isinstance(result["scale"], (int, float)):
        known[float(result["scale"])] = float(result["accuracy"])
    return known


def _scale_lines(measured: Measured) -> dict[str, _ScaleLine]:
    by_method: dict[str, list[tuple[str, Measures]]] = {}
    for training in measured.found:
        for found in measured.over_seeds(training):
            for name, of_method in found["methods"].items():
                by_method.setdefault(name, []).append((training, of_method))
    lines = {}
    for name in in_table_order(by_method):
        seeds = [of_method for _, of_method in by_method[name]]
        # A scale that was chosen in each run anew is a point of that run only.
        scales = sorted(set.intersection(*(set(seed["scales"]) for seed in seeds)))
        values = [
            [seed["accuracy"][seed["scales"].index(scale)] for scale in scales] for seed in seeds
        ]
        own = {seed["own"] for seed in seeds}
        lines[name] = _ScaleLine(
            by_method[name][0][0],
            seeds[0]["merger"],
            scales,
            over_seeds(values),
            own.pop() if len(own) == 1 else None,
        )
    return lines
