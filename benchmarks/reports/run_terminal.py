"""What a run says in the terminal: its tasks, and the table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.formatting import counted, data_label, rounded
from cl_merge.benchmarks.methods.method import grouped_methods
from cl_merge.benchmarks.reports.figures.style import shortened
from cl_merge.benchmarks.reports.run_pictures import PICTURES
from cl_merge.benchmarks.runs.results import finished_results

if TYPE_CHECKING:
    from cl_merge.benchmarks.methods.method import Training
    from cl_merge.benchmarks.runs.run import Run
    from cl_merge.training.fit import TaskEnd

_COLUMNS = {
    "accuracy": "accuracy",
    "task_aware_accuracy": "aware",
    "average_incremental_accuracy": "incr.",
    "forgetting": "forgetting",
    "probe_accuracy": "probes",  # only where there are some
}


def results_table(results: Mapping[str, Any]) -> Table:
    """Make the table of a run's ``results.json``; the best accuracy of a merging method is bold."""
    methods = results["methods"]
    merging = {name: own["accuracy"] for name, own in methods.items() if own["merger"]}
    best = max(merging.values(), default=None)
    probed = any(method.get("probes") for method in methods.values())
    columns = {key: title for key, title in _COLUMNS.items() if probed or key != "probe_accuracy"}
    table = Table(
        # Names of files may hold what rich takes for its markup.
        title=escape(
            f"{shortened(data_label(results['data']), 30)} with {shortened(results['model'], 30)}, "
            f"{counted(len(results['tasks']), 'task')}, seed {results['seed']}: "
            "per cent after the last task"
        ),
        caption="accuracy: all test images, among all classes; aware: among the classes of "
        "the image's own task; incr.: mean over tasks of the accuracy on everything seen so far"
        + ("; probes: data sets beside the stream" if probed else ""),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for title in ("scale", *columns.values()):
        table.add_column(title, justify="right", no_wrap=True)
    trainings = {name: method["training"] for name, method in methods.items()}
    for title, group in grouped_methods(trainings).items():
        table.add_section()
        table.add_row(title, style="dim italic")
        for name in group:
            values = [methods[name]["metrics"].get(key) for key in columns]
            figures = ["-" if value is None else rounded(value) for value in values]
            style = "bold" if name in merging and merging[name] == best else ""
            table.add_row(escape(name), _scale(methods[name]), *figures, style=style)
    return table


def show_start(console: Console, run: Run) -> None:
    """Say what a run is about to do."""
    config, tasks = run.config, run.stream.tasks
    held_out = sum(len(task.held_out) for task in tasks)
    apart = f"{held_out} held out, " if held_out else ""
    console.print(
        f"{find_data(config.data).name} with {config.model}: {len(run.stream.class_names)} classes "
        f"in {counted(len(tasks), 'task')} ({config.stream.scenario}-incremental), "
        f"{sum(len(task.train) for task in tasks)} images to train on, "
        f"{apart}{sum(len(task.test) for task in tasks)} to test on; writing to {run.folder.path}",
        markup=False,
        soft_wrap=True,
    )


def show_task(console: Console, run: Run, training: Training, end: TaskEnd) -> None:
    """Say how good the methods of a training are on everything seen, after one more task."""
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
        console.print(said, soft_wrap=True)
        return
    console.print(f"{said}; accuracy on everything seen, %:", soft_wrap=True)
    best = max(figures.values())
    shown = [
        f"[bold]{name} {rounded(value)}[/]" if value == best else f"{name} {rounded(value)}"
        for name, value in figures.items()
    ]
    line = ", ".join(shown)
    if console.is_terminal:
        console.print(Padding(line, (0, 0, 0, 2)))
    else:  # a line of a log, to be searched for
        console.print(f"  {line}", soft_wrap=True)


def show_results(console: Console, folder: Path) -> None:
    """Show the table of a finished run."""
    results = finished_results(folder)
    console.print()
    console.print(results_table(results))
    total, logs = results["total"], "logs, " if (folder / "logs").exists() else ""
    console.print(
        f"{total['seconds']:.0f} s, at most {total['peak_memory'] / 2**30:.1f} GiB of memory. "
        f"{folder} holds the merged weights, the task vectors, results.json, {logs}"
        f"{' and '.join(f'{name}.png' for name in reversed(PICTURES))}.",
        markup=False,
        soft_wrap=True,
    )


def _scale(method: Mapping[str, Any]) -> str:
    scale = method["scale"]
    if scale is None:
        return ""
    numbers = sorted(set(scale.values())) if isinstance(scale, Mapping) else [scale]
    shown = "-".join(f"{number:.3g}" for number in dict.fromkeys((numbers[0], numbers[-1])))
    return f"{shown} auto" if "chosen_scales" in method else shown
