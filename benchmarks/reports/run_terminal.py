"""What a run shows: the table at its end, and the pictures in its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.formatting import counted, rounded
from cl_merge.benchmarks.methods.method import grouped_methods
from cl_merge.benchmarks.reports.figures.style import new_canvas
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cl_merge.benchmarks.methods.method import Training
    from cl_merge.benchmarks.runs.run import Run
    from cl_merge.training.fit import TaskEnd

_COLUMNS = {
    "accuracy": "accuracy",
    "task_aware_accuracy": "aware",
    "average_incremental_accuracy": "incr.",
    "forgetting": "forgetting",
}


def results_table(results: Mapping[str, Any]) -> Table:
    """Make the table of a run.

    Args:
        results: The content of ``results.json``.

    Returns:
        The table; the best accuracy of a merging method is bold.
    """
    methods = results["methods"]
    merging = [name for name in methods if methods[name]["merger"]]
    best = max(merging or methods, key=lambda name: methods[name]["accuracy"])
    table = Table(
        # Names of files may hold what rich takes for its markup.
        title=escape(
            f"{_short(results['data'], 30)} with {_short(results['model'], 30)}, "
            f"{counted(len(results['tasks']), 'task')}, seed {results['seed']}: "
            "per cent after the last task"
        ),
        caption="accuracy: all test images, among all classes; aware: among the classes of "
        "the image's own task; incr.: mean over tasks of the accuracy on everything seen so far",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("scale", justify="right", no_wrap=True)
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for title, group in grouped_methods(
        {name: methods[name]["training"] for name in methods}
    ).items():
        table.add_section()
        table.add_row(title, style="dim italic")
        for name in group:
            method = methods[name]
            figures = [_figure(method["metrics"][key]) for key in _COLUMNS]
            table.add_row(
                escape(name), _scale(method), *figures, style="bold" if name == best else ""
            )
    return table


def show_start(console: Console, run: Run) -> None:
    """Say what a run is about to do.

    Args:
        console: Where to print.
        run: The run.
    """
    stream = run.stream
    train = sum(len(task.train) for task in stream.tasks)
    held_out = sum(len(task.held_out) for task in stream.tasks)
    test = sum(len(task.test) for task in stream.tasks)
    apart = f"{held_out} held out, " if held_out else ""
    console.print(
        f"{find_data(run.config.data).name} with {run.config.model}: "
        f"{len(stream.class_names)} classes in {counted(len(stream.tasks), 'task')} "
        f"({run.config.stream.scenario}-incremental), {train} images to train on, {apart}{test} "
        f"to test on; writing to {run.folder.path}",
        markup=False,
    )


def show_task(console: Console, run: Run, training: Training, end: TaskEnd) -> None:
    """Say how good the methods are on everything seen so far.

    Args:
        console: Where to print.
        run: The run.
        training: How these methods are trained.
        end: The task that was just learned.
    """
    figures = {
        escape(method.name): run.matrices[method.name].seen()[-1]
        for method in run.trainings[training.name]
        if run.matrices[method.name].rows
    }
    tasks = len(run.stream.tasks)
    which = counted(tasks, "task") if training.joint else f"task {end.task.index + 1}/{tasks}"
    said = f"[bold]{which}[/] ({escape(end.task.name)}), {training.name} training, "
    said += f"{end.cost.seconds:.0f} s"
    if not figures:
        console.print(said)
        return
    console.print(f"{said}; accuracy on everything seen, %:")
    best = max(figures.values())
    shown = [
        f"[bold]{name} {rounded(value)}[/]" if value == best else f"{name} {rounded(value)}"
        for name, value in figures.items()
    ]
    console.print(Padding(", ".join(shown), (0, 0, 0, 2)))


def show_results(console: Console, folder: Path) -> None:
    """Show the table of a finished run.

    Args:
        console: Where to print.
        folder: The run's folder.
    """
    results = finished_results(folder)
    console.print()
    console.print(results_table(results))
    total = results["total"]
    console.print(
        f"{total['seconds']:.0f} s, at most {total['peak_memory'] / 2**30:.1f} GiB of memory. "
        f"{folder} holds the merged weights, the task vectors, results.json, logs, "
        f"{' and '.join(_PICTURES)}.",
        markup=False,
    )


def draw_pictures(results: Mapping[str, Any], folder: Path) -> None:
    """Draw the pictures of a run: its method's accuracy matrix, and all methods' curves.

    Args:
        results: The content of ``results.json``.
        folder: Where they go.
    """
    for name, draw in _PICTURES.items():
        with atomic_write(folder / name) as temporary:
            draw(results).savefig(temporary, dpi=150, format="png")


def _matrix(results: Mapping[str, Any]) -> Figure:
    """The accuracy matrix of the run's method as a heat map, zero-shot as its first row."""
    method = results["method"]
    matrix = results["methods"][method]["matrix"]
    rows = [results["methods"]["zero-shot"]["matrix"][0], *matrix]
    names = [task["name"] for task in results["tasks"]]
    after = [f"task {i + 1}" for i in range(len(names))] if len(matrix) > 1 else ["all tasks"]
    figure = new_canvas(2.2 + 0.5 * len(rows), 2.5 + 0.7 * len(names))
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in rows]
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), ["zero-shot", *after])
    axes.set_xlabel("accuracy on task")
    axes.set_ylabel("after")
    axes.set_title(f"{method} on {_short(results['data'], 30)}: task-agnostic accuracy, %")
    if len(names) <= 20:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                shade = "white" if value is not None and value < 60 else "black"
                axes.text(
                    j, i, _figure(value, 0), ha="center", va="center", color=shade, fontsize=8
                )
    figure.colorbar(image, ax=axes)
    return figure


def _curve(results: Mapping[str, Any]) -> Figure:
    """Accuracy on everything seen after each task, a line per method."""
    figure = new_canvas(5.0, 8.5)
    axes = figure.add_subplot()
    steps = range(1, len(results["tasks"]) + 1)
    styles = {None: ":", "sequential": "-", "independent": "--", "lwf": "-.", "ewc": (0, (1, 1))}
    # A merger has one colour, whichever training it merges, and another with class statistics; the
    # line style tells the training.
    kinds = {
        name: (method["merger"] or name, method.get("statistics"))
        for name, method in results["methods"].items()
    }
    colours = {kind: f"C{index % 10}" for index, kind in enumerate(dict.fromkeys(kinds.values()))}
    for name, method in results["methods"].items():
        # Joint training has a last point only, which a line through it would not show.
        axes.plot(
            steps,
            [float("nan") if value is None else value for value in method["seen"]],
            linestyle=styles.get(method["training"], "-"),
            color=colours[kinds[name]],
            marker="D" if method.get("statistics") else "o",
            markersize=3,
            linewidth=2.5 if name == results["method"] else 1.2,
            label=name,
        )
    axes.set_xticks(list(steps))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("accuracy on everything seen, %")
    axes.set_title(f"{_short(results['data'], 30)} with {_short(results['model'], 30)}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


_PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "accuracy_matrix.png": _matrix,
    "accuracy_by_task.png": _curve,
}


def _scale(method: Mapping[str, Any]) -> str:
    scale = method["scale"]
    if scale is None:
        return ""
    numbers = sorted(set(scale.values())) if isinstance(scale, Mapping) else [scale]
    shown = "-".join(f"{number:g}" for number in dict.fromkeys((numbers[0], numbers[-1])))
    return f"{shown} auto" if "chosen_scales" in method else shown


def _figure(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else rounded(value, digits)


def _short(text: str, limit: int = 16) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
