"""Accuracy against the share of a task vector that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cl_merge.analysis import KEPT, keep
from cl_merge.benchmarks.reports.figures.figure import Drawn, Found, Kind, Measured, Table
from cl_merge.benchmarks.reports.figures.runs import SuiteRun
from cl_merge.benchmarks.reports.figures.seeds import Line, number, over_seeds, seeds_note
from cl_merge.benchmarks.reports.figures.style import (
    COLOURS,
    GREY,
    draw_line,
    legend_beside,
    new_canvas,
)
from cl_merge.benchmarks.reports.figures.trainings import PLAIN, TITLES
from cl_merge.task_vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from cl_merge.benchmarks.runs.evaluator import RunEvaluator

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the parameters; all of them come on top."""

_LOOKS = {
    "highest": {"color": COLOURS["magmax"], "marker": "o", "markeredgewidth": 0},
    "random": {"color": COLOURS["random-mix"], "marker": "D", "markeredgewidth": 0},
    "lowest": {"color": COLOURS["average"], "marker": "s", "markeredgewidth": 0},
}


def measure_pruning(run: SuiteRun, get_replay: Callable[[], RunEvaluator]) -> Found:
    """Prune the task vector of each task, and evaluate on the task's test images.

    Args:
        run: The run.
        get_replay: Loads its model and images.

    Returns:
        ``kept``: for each choice of entries, by task, accuracy in per cent among the task's classes
        for each share of `SHARES`; ``whole``: by task, that of the whole task vector;
        ``zero_shot``: by task, that of the pre-trained weights.
    """
    replay = get_replay()
    kept: dict[str, list[list[float]]] = {which: [] for which in KEPT}
    whole = []
    for task, vector in enumerate(run.vectors()):
        whole.append(_accuracy(replay, vector, task))
        for which, of_tasks in kept.items():
            of_tasks.append(
                [_accuracy(replay, keep(vector, share, which), task) for share in SHARES]
            )
        del vector
    zero_shot = run.results["methods"]["zero-shot"]["matrix_task_aware"][0]
    return {"kept": kept, "whole": whole, "zero_shot": zero_shot}


def draw_pruning(measured: Sequence[Measured]) -> Drawn | None:
    """Draw accuracy against the share that is kept, the mean over tasks.

    Args:
        measured: One setting.

    Returns:
        The figure; None if nothing was measured.
    """
    setting = measured[0].setting
    lines = measured[0].by_training(_lines)
    if not lines:
        return None
    canvas = new_canvas(0.5 + 2.25 * len(lines))
    all_axes = canvas.subplots(len(lines), sharex=True, sharey=True, squeeze=False)[:, 0]
    x = [100 * share for share in (*SHARES, 1.0)]
    for axes, (training, (choices, zero_shot)) in zip(all_axes, lines.items(), strict=True):
        axes.set_title(TITLES[training])
        unpruned = choices["highest"].means[-1]
        axes.axhline(unpruned, color=GREY, linestyle=(0, (5, 2)), label="unpruned", linewidth=1.2)
        for which, look in _LOOKS.items():
            draw_line(axes, x, choices[which], which, look)
        axes.axhline(zero_shot, color=GREY, linestyle=(0, (1, 1.5)), label="zero-shot")
        legend_beside(axes)
    axes = all_axes[-1]
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlabel("share of the task vector kept, %")
    canvas.supylabel("accuracy on the task, %", fontsize=10)
    seeds = max(choices["highest"].seeds for choices, _ in lines.values())
    return Drawn(
        canvas,
        f"Pruned task vectors on {setting.title}",
        "Pre-trained weights plus one task vector of which only the parameters of highest or "
        "lowest magnitude, or random ones, are kept; accuracy on the test images of that task, "
        f"among its own classes, as the mean over tasks. {seeds_note(seeds)}",
        _alt(lines),
        _table(lines),
    )


def estimate_pruning(run: SuiteRun) -> int:
    """Tell how many images are classified.

    Args:
        run: The run.

    Returns:
        Their number.
    """
    return run.test_images * (1 + len(KEPT) * len(SHARES))


PRUNING = Kind(
    "pruning",
    draw_pruning,
    measure_pruning,
    estimate_pruning,
    trainings=PLAIN,
    options={"shares": SHARES},
)

_Lines = dict[str, tuple[dict[str, Line], float]]


def _accuracy(replay: RunEvaluator, vector: TaskVector, task: int) -> float:
    _, aware, total = replay.counts(vector.items(), 1.0, task)[:, task].tolist()
    return 100.0 * aware / total if total else float("nan")


def _lines(all_found: Sequence[Found]) -> tuple[dict[str, Line], float]:
    """By choice the accuracy at each share and without pruning; that of zero-shot."""
    choices = {}
    for which in _LOOKS:
        seeds = []
        for found in all_found:
            points = list(zip(*found["kept"][which], strict=True))
            seeds.append([_mean(point) for point in (*points, found["whole"])])
        choices[which] = over_seeds(seeds)
    return choices, _mean([_mean(found["zero_shot"]) for found in all_found])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def _alt(lines: _Lines) -> str:
    said = []
    for training, (choices, zero_shot) in lines.items():
        at = SHARES.index(0.2)
        parts = ", ".join(f"{which} {line.means[at]:.1f} %" for which, line in choices.items())
        said.append(
            f"{training} training: zero-shot {zero_shot:.1f} %; with 20 % kept {parts}; unpruned "
            f"{choices['highest'].means[-1]:.1f} %"
        )
    return f"Accuracy against the share kept. {'. '.join(said)}."


def _table(lines: _Lines) -> Table:
    heads = [f"{100 * share:g} %" for share in (*SHARES, 1.0)]
    rows: list[tuple[str | float | None, ...]] = []
    for training, (choices, zero_shot) in lines.items():
        for which, line in choices.items():
            rows.append((training, which, *(number(value) for value in line.means)))
        rows.append((training, "none (zero-shot)", *[number(zero_shot)] * len(heads)))
    return Table(("training", "kept", *heads), tuple(rows))
