"""Accuracy against the scale of the merged task vector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.methods.method import find_method
from cl_merge.benchmarks.reports.figures.figure import Drawn, Found, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.runs import SuiteRun, in_table_order
from cl_merge.benchmarks.reports.figures.seeds import Line, number, over_seeds, seeds_note
from cl_merge.benchmarks.reports.figures.style import (
    GREY,
    INK,
    draw_line,
    legend_beside,
    look_of,
    new_canvas,
)
from cl_merge.config.reading import read_config
from cl_merge.mergers import Merger

if TYPE_CHECKING:
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

log = logging.getLogger(__name__)

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Those at which every merger is evaluated, besides its own."""

_PANELS = {"independent": "independent training"}
_OTHER = "sequential training"


def measure_scale(run: SuiteRun, get_replay: Callable[[], RunEvaluator]) -> Found:
    """Merge a run's task vectors with each of its methods, and evaluate several scales.

    Args:
        run: The run.
        get_replay: Loads its model and images.

    Returns:
        By method: ``merger``, ``scales`` in ascending order, ``accuracy`` after the last task on
        all test images, in per cent, at each of them, and ``own``, the scale that the method was
        run with, None if it had several.
    """
    replay, found = get_replay(), {}
    for name, result in _merging(run).items():
        merger = _merger(run, name)
        if merger is None:
            continue
        for vector in run.vectors():
            merger.update(vector)
            del vector
        merged = merger.merged()
        known = _known(run, result)
        scales = sorted({*SCALES, *known})
        accuracy = [
            known[scale] if scale in known else replay.accuracy(merged.items(), scale)
            for scale in scales
        ]
        own = next((scale for scale in known if scale), None)
        found[name] = {
            "merger": result["merger"],
            "scales": scales,
            "accuracy": accuracy,
            "own": own,
        }
    return {"methods": found}


def draw_scale(measured: Sequence[Measured]) -> Drawn | None:
    """Draw accuracy against scale.

    Args:
        measured: One setting.

    Returns:
        The figure; None if nothing was measured.
    """
    setting = measured[0].setting
    lines = _lines(measured[0])
    if not lines:
        return None
    panels: dict[str, list[str]] = {}
    for name, (training, *_) in lines.items():
        panels.setdefault(_PANELS.get(training, _OTHER), []).append(name)
    canvas = new_canvas(0.5 + 2.25 * len(panels))
    all_axes = canvas.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(title)
        for name in names:
            training, merger, x, line, own = lines[name]
            look = look_of(merger, training) | {"markersize": 2.5}
            draw_line(axes, x, line, name.removesuffix("-sequential"), look)
            if own in x:
                big = {**look, "markersize": 8, "linestyle": "", "markeredgewidth": 0.8}
                axes.plot(own, line.means[x.index(own)], **big, markeredgecolor=INK, zorder=5)
        zero = lines[names[0]][3].means[0]
        axes.axhline(zero, color=GREY, linestyle=(0, (1, 1.5)), label="zero-shot")
        legend_beside(axes)
    all_axes[-1].set_xlabel("scale of the merged task vector")
    canvas.supylabel("accuracy after the last task, %", fontsize=10)
    seeds = max(line.seeds for _, _, _, line, _ in lines.values())
    return Drawn(
        canvas,
        f"Scale of the merge on {setting.title}",
        "Accuracy on all test images among all classes, after the last task. Large markers: the "
        "scale that each method was run with. This is an analysis on test images, and not a way to "
        f"choose a scale: that needs images that are not tested on. {seeds_note(seeds)}",
        _alt(lines),
        _table(lines),
    )


def estimate_scale(run: SuiteRun) -> int:
    """Tell how many images are classified.

    Args:
        run: The run.

    Returns:
        Their number.
    """
    points = [len({*SCALES} - {*_known(run, result)}) for result in _merging(run).values()]
    return run.test_images * sum(points)


SCALE = Kind("scale", draw_scale, measure_scale, estimate_scale, options={"scales": SCALES})

_Lines = dict[str, tuple[str, str, list[float], Line, float | None]]


def _merging(run: SuiteRun) -> dict[str, Mapping[str, Any]]:
    methods = run.results["methods"]
    return {
        name: result
        for name, result in methods.items()
        if result["merger"]
        and result["training"] == run.training
        and not result.get("statistics")  # of the same merged weights
    }


def _merger(run: SuiteRun, name: str) -> Merger | None:
    from cl_merge.benchmarks.runs.run import make_merger  # brings the parts that train

    merger, _ = make_merger(read_config([], {}, run.folder / "config.yaml"), find_method(name))
    if merger.weighted:
        log.info("%s: '%s' needs more than task vectors, and is left out", run.folder, name)
        return None
    return merger


def _known(run: SuiteRun, result: Mapping[str, Any]) -> dict[float, float]:
    """What the run itself has evaluated: nothing of the merge, and the method's own scale."""
    known = {0.0: float(run.results["methods"]["zero-shot"]["accuracy"])}
    if isinstance(result["scale"], (int, float)):
        known[float(result["scale"])] = float(result["accuracy"])
    return known


def _lines(measured: Measured) -> _Lines:
    """By method: training, merger, scales, accuracy over seeds, and the method's own scale."""
    by_method: dict[str, list[tuple[str, Found]]] = {}
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
        lines[name] = (
            by_method[name][0][0],
            seeds[0]["merger"],
            scales,
            over_seeds(values),
            own.pop() if len(own) == 1 else None,
        )
    return lines


def _alt(lines: _Lines) -> str:
    said = []
    for name, (_, _, x, line, _) in lines.items():
        best = max(range(len(x)), key=lambda i: line.means[i])
        said.append(f"{name} {line.means[best]:.1f} % at {x[best]:g}")
    return f"Accuracy against scale. Highest: {', '.join(said)}."


def _table(lines: _Lines) -> Table:
    rows = []
    for name, (_, _, x, line, own) in lines.items():
        at = [number(line.means[x.index(scale)]) for scale in SCALES]
        rows.append((name, own, number(line.means[x.index(own)]) if own in x else None, *at))
    heads = (f"at {scale:g}" for scale in SCALES)
    return Table(("method", "own scale", "at its own", *heads), tuple(rows))
