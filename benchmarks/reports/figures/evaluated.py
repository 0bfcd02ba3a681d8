"""Figures that need the model once more: pruned task vectors, and the scale of the merge."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_merge.analysis import KEPT, keep
from cl_merge.benchmarks.methods.method import find_method
from cl_merge.benchmarks.reports.figures import style
from cl_merge.benchmarks.reports.figures.style import Drawing, Line
from cl_merge.benchmarks.reports.figures.suite_runs import (
    Measured,
    Measures,
    SuiteRun,
    in_table_order,
)
from cl_merge.config.reading import read_config
from cl_merge.task_vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

log = logging.getLogger(__name__)

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the parameters that pruning keeps; all of them come on top."""

_KEPT_LOOKS = {
    which: style.look_of(merger, None) | {"linestyle": "-"}
    for which, merger in (("highest", "magmax"), ("random", "random-mix"), ("lowest", "average"))
}


def measure_pruning(run: SuiteRun, get_evaluator: Callable[[], RunEvaluator]) -> Measures:
    """Prune the task vector of each task, and evaluate on the task's test images.

    Accuracies are in per cent among the task's classes: ``kept`` by choice of entries, task and
    share of `SHARES`, ``whole`` of unpruned task vectors, and ``zero_shot``.
    """
    evaluator = get_evaluator()

    def accuracy(vector: TaskVector, task: int) -> float:
        _, aware, total = evaluator.counts(vector.items(), 1.0, task)[:, task].tolist()
        return 100.0 * aware / total if total else float("nan")

    kept: dict[str, list[list[float]]] = {which: [] for which in KEPT}
    unpruned = []
    for task, vector in enumerate(run.vectors()):
        unpruned.append(accuracy(vector, task))
        for which, of_tasks in kept.items():
            of_tasks.append([accuracy(keep(vector, share, which), task) for share in SHARES])
        del vector
    zero_shot = run.results["methods"]["zero-shot"]["matrix_task_aware"][0]
    return {"kept": kept, "whole": unpruned, "zero_shot": zero_shot}


def draw_pruning(measured: Measured) -> Drawing | None:
    """Draw accuracy against the share of a task vector that is kept, the mean over tasks."""
    lines = measured.by_training(_pruned_lines)
    if not lines:
        return None
    canvas, panels = style.new_panels(
        [f"{training} training" for training in lines], 2.25, edge=0.5
    )
    x = [100 * share for share in (*SHARES, 1.0)]
    rows: list[tuple[str | float | None, ...]] = []
    for axes, (training, (choices, zero_shot)) in zip(panels.values(), lines.items(), strict=True):
        unpruned = choices["highest"].mean[-1]
        axes.axhline(
            unpruned, color=style.GREY, linestyle=style.DASHED, label="unpruned", linewidth=1.2
        )
        for which, line in choices.items():
            style.draw_line(axes, x, line, which, **_KEPT_LOOKS[which])
            rows.append((training, which, *map(style.number, line.mean)))
        axes.axhline(zero_shot, color=style.GREY, linestyle=style.DOTTED, label="zero-shot")
        rows.append((training, "none (zero-shot)", *[style.number(zero_shot)] * len(x)))
        style.legend_beside(axes)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlabel("share of the task vector kept, %")
    canvas.supylabel("accuracy on the task, %")
    return Drawing(
        canvas,
        f"Pruned task vectors on {measured.setting.title}",
        "Pre-trained weights plus one task vector of which only the parameters of highest or "
        "lowest magnitude, or random ones, are kept; accuracy on the test images of that task, "
        f"among its own classes, as the mean over tasks. {style.seeds_note(measured.seeds)}",
        ("training", "kept", *(f"{value:g} %" for value in x)),
        tuple(rows),
    )


def _pruned_lines(every: Sequence[Measures]) -> tuple[dict[str, Line], float]:
    """By choice the accuracy at each share and without pruning; that of zero-shot."""

    def over_tasks(values: Any) -> Any:
        return np.nanmean(np.array(values, dtype=float), axis=0)

    choices = {
        which: style.over_seeds(
            [[*over_tasks(found["kept"][which]), over_tasks(found["whole"])] for found in every]
        )
        for which in _KEPT_LOOKS
    }
    return choices, float(np.mean([over_tasks(found["zero_shot"]) for found in every]))


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
        # What the run itself has evaluated: nothing of the merge, and the method's own scale.
        known = {0.0: float(run.results["methods"]["zero-shot"]["accuracy"])}
        if isinstance(result["scale"], (int, float)):
            known[float(result["scale"])] = float(result["accuracy"])
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
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    trainings: dict[str, str] = {}
    for training, every in measured.found.items():
        for found in every:
            for name, of_method in found["methods"].items():
                by_method.setdefault(name, []).append(of_method)
                trainings.setdefault(name, training)
    if not by_method:
        return None
    titles = {
        name: f"{'independent' if trainings[name] == 'independent' else 'sequential'} training"
        for name in in_table_order(by_method)
    }
    lines = Counter(titles.values())
    # Beside each panel the legend, which has zero-shot, too.
    canvas, panels = style.new_panels(lines, 2.25, edge=0.5, lines=1 + max(lines.values()))
    zero_shot: dict[str, float] = {}
    rows = []
    for name, title in titles.items():
        seeds = by_method[name]
        # A scale that was chosen in each run anew is a point of that run only.
        scales = sorted(set.intersection(*(set(seed["scales"]) for seed in seeds)))
        points = [dict(zip(seed["scales"], seed["accuracy"], strict=True)) for seed in seeds]
        line = style.over_seeds([[of_seed[scale] for scale in scales] for of_seed in points])
        means = dict(zip(scales, map(float, line.mean), strict=True))
        look = style.look_of(seeds[0]["merger"], trainings[name]) | {"markersize": 2.5}
        style.draw_line(panels[title], scales, line, name.removesuffix("-sequential"), **look)
        own = {seed["own"] for seed in seeds}
        scale = own.pop() if len(own) == 1 else None  # None, too, if a run had several
        accuracy = None if scale is None else means.get(scale)
        if scale is not None and accuracy is not None:
            large = {**look, "markersize": 8, "linestyle": "", "markeredgewidth": 0.8}
            panels[title].plot(scale, accuracy, **large, markeredgecolor=style.INK, zorder=5)
        zero_shot.setdefault(title, means[0.0])
        at_scales = [style.number(means[scale]) for scale in SCALES]
        rows.append((name, scale, accuracy and style.number(accuracy), *at_scales))
    for title, axes in panels.items():
        axes.axhline(zero_shot[title], color=style.GREY, linestyle=style.DOTTED, label="zero-shot")
        style.legend_beside(axes)
    axes.set_xlabel("scale of the merged task vector")
    canvas.supylabel("accuracy after the last task, %")
    return Drawing(
        canvas,
        f"Scale of the merge on {measured.setting.title}",
        "Accuracy on all test images among all classes, after the last task. Large markers: the "
        "scale that each method was run with. This is an analysis on test images, and not a way to "
        "choose a scale: that needs images that are not tested on. "
        f"{style.seeds_note(max(map(len, by_method.values())))}",
        ("method", "own scale", "at its own", *(f"at {scale:g}" for scale in SCALES)),
        tuple(rows),
    )
