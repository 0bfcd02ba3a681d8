"""What lifts the text head alone: other merging and other training, without class statistics.

    python -m cl_merge.benchmarks.studies.text_head_only runs/offline/caltech101-10/seed*/sequential

Each way is compared with MagMax of plain sequential fine-tunings at its published scale, by the
accuracy of the merged model on all test images among all classes. Ways that merge differently use
the task vectors that `cl-merge run` has left; ways that train differently train anew with the
run's settings and seed. No constant here was chosen on test images: scales are the published
ones, and 0.8 a layer was chosen for the learning rate on training images that the runs of
Caltech-101 do not use, and taken over for the scale.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.benchmarks.datasets.epochs import task_epochs
from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.studies.store_accuracy import task_vectors
from cl_merge.callbacks import MergeCallback
from cl_merge.data.task_stream import TaskStream
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError
from cl_merge.mergers import get_merger, merge
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.layers import layer_depths
from cl_merge.task_vectors.task_vector import TaskVector
from cl_merge.training.fit import fit_stream

DECAY = 0.8
PLAIN = "magmax"

Vectors = list[TaskVector]
Found = dict[str, Tensor]


class SeenClasses(CLIPClassifier):
    """Trains on the cross entropy over all classes seen so far; those of a task come last."""

    @override
    def task_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        stream = self._stream()
        assert stream is not None  # noqa: S101 - `train` gives it one
        seen = seen_classes(stream)
        position = torch.full((len(stream.class_names),), -1)
        position[seen] = torch.arange(len(seen))
        return self(batch[0], seen), position.to(batch[1].device)[batch[1]]


def seen_classes(stream: TaskStream) -> list[int]:
    """The classes of all tasks up to the current one, each once, in the order of the stream."""
    tasks = stream.tasks[: stream.task.index + 1]
    return list(dict.fromkeys(label for task in tasks for label in task.classes))


# Ways to merge: of the task vectors in order, the change of the weights, its scale in it.


def merged_by(method: str) -> Callable[[Vectors], Found]:
    """Make the way of a method at its published scale."""

    def way(vectors: Vectors) -> Found:
        scale = get_merger(method).published_scale
        return {name: scale * value for name, value in merge(vectors, method).items()}

    return way


def mean_over_time(vectors: Vectors) -> Found:
    """The mean of the models that MagMax has after each task."""
    merger = get_merger(PLAIN)
    total = {name: torch.zeros_like(value) for name, value in vectors[0].items()}
    for vector in vectors:
        merger.update(vector)
        for name, value in merger.items():
            total[name] += merger.published_scale * value / len(vectors)
    return total


def sign_consistency(vectors: Vectors) -> Found:
    """MagMax, each element times the share of the tasks' total magnitude that has one sign.

    The share is ``abs(sum) / sum(abs)``: 1 where all tasks agree, 0 where they cancel out.
    """
    found = {}
    for name, value in merged_by(PLAIN)(vectors).items():
        stacked = torch.stack([vector[name] for vector in vectors])
        share = stacked.sum(dim=0).abs() / stacked.abs().sum(dim=0).clamp(min=1e-30)
        found[name] = value * share
    return found


def layer_scales(vectors: Vectors) -> Found:
    """MagMax with a scale that falls by `DECAY` from each layer to the one before it."""
    depths = layer_depths(vectors[0])
    last = max(depths.values())
    found = merged_by(PLAIN)(vectors)
    return {name: value * DECAY ** (last - depths[name]) for name, value in found.items()}


MERGING: dict[str, Callable[[Vectors], Found]] = {
    PLAIN: merged_by(PLAIN),
    "mean of merged models over time": mean_over_time,
    "ema": merged_by("ema"),
    "opcm": merged_by("opcm"),
    "sign consistency": sign_consistency,
    "scale falls towards early layers": layer_scales,
}
TRAINING: dict[str, dict[str, Any]] = {
    "start=merged": {"start": "merged"},
    "cross entropy over classes seen": {"seen": True},
    "layer_decay": {"layer_decay": DECAY},
}
"""By name of the way, what `train` is given."""


def measure(folder: Path, ways: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Measure one run in several ways.

    Args:
        folder: Of a finished run with sequential task vectors.
        ways: Names of the ways.

    Yields:
        The name of each way and its accuracy on all test images in per cent.

    Raises:
        InputError: If the plain way does not give what the run's results say.
    """
    if not ways:
        return
    replay = RunEvaluator.of(folder)
    vectors: Vectors = list(task_vectors(folder / "task_vectors" / "sequential"))
    for name in ways:
        if name in MERGING:
            found = replay.accuracy(MERGING[name](vectors).items(), 1.0)
        else:
            merger = train(replay, **TRAINING[name]).merger
            found = replay.accuracy(merger.items(), merger.published_scale)
        if name == PLAIN:
            _check_plain(folder, found)
        yield name, found


def train(
    replay: RunEvaluator, *, start: str = "sequential", seen: bool = False, layer_decay: float = 1.0
) -> MergeCallback:
    """Train a run's stream anew, with the run's settings but for what is given.

    Args:
        replay: Of the run; its model is trained, from the pre-trained weights.
        start: Where a task's training starts, as of `MergeCallback`.
        seen: Whether the loss is over all classes seen so far instead of the task's.
        layer_decay: As of `CLIPClassifier`.

    Returns:
        The callback with the merged task vectors.
    """
    config, stream = replay.config, replay.stream
    kind = SeenClasses if seen else CLIPClassifier
    options = asdict(config.optimizer) | {"layer_decay": layer_decay}
    model = kind(replay.model.visual, replay.model.head, **options)
    callback, epochs = MergeCallback(PLAIN, start=start), task_epochs(config, len(stream.tasks))
    model.load_state_dict(replay.base, strict=False)

    def trainer(task: Task) -> L.Trainer:
        quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar"), False)
        quiet |= {"enable_model_summary": False, "logger": False}
        return L.Trainer(**quiet | config.trainer | {"max_epochs": epochs[task.index]})

    fit_stream(
        model, stream, callbacks=[callback], trainer=trainer, evaluate=False, seed=config.seed
    )
    return callback


def main(words: Sequence[str] | None = None) -> None:
    """Measure every run, and print each way with its difference to the plain one, by setting.

    Args:
        words: Of the command; those of the process if None.
    """
    logging.getLogger("lightning").setLevel(logging.ERROR)
    ways = [*MERGING, *TRAINING]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished sequential runs")
    parser.add_argument("--only", nargs="+", choices=ways, default=ways, metavar="WAY")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="go on with what it holds")
    arguments = parser.parse_args(words)
    only = list(dict.fromkeys([PLAIN, *arguments.only]))
    known: dict[str, dict[str, float]] = {}
    if arguments.keep and arguments.keep.exists():
        known = json.loads(arguments.keep.read_text())
    settings: dict[str, list[dict[str, float]]] = {}
    for folder in arguments.runs:
        place = folder.resolve()
        found = known.setdefault(str(place), {})
        for name, accuracy in measure(folder, [name for name in only if name not in found]):
            found[name] = accuracy
            if arguments.keep:
                arguments.keep.write_text(json.dumps(known, indent=1))
        settings.setdefault(place.parts[-3], []).append(found)
    _print(settings, only)


def _check_plain(folder: Path, found: float) -> None:
    expected = finished_results(folder)["methods"][PLAIN]["accuracy"]
    if abs(found - expected) > 1e-6:
        raise InputError(
            f"'{folder}': MagMax of its task vectors has {found:.4f} % here, but results.json says "
            f"{expected:.4f}; expected the images and the number of threads of the run"
        )


def _print(settings: Mapping[str, list[dict[str, float]]], only: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("way", *settings, box=box.SIMPLE_HEAD)
    for name in only:
        cells = []
        for runs in settings.values():
            values = [run[name] for run in runs]
            apart = [run[name] - run[PLAIN] for run in runs]
            difference = "" if name == PLAIN else f"  {_figure(apart, '+')}"
            cells.append(_figure(values) + difference)
        table.add_row(name, *cells)
    Console(width=max(80, 40 + 30 * len(settings)), file=sys.stdout).print(table)


def _figure(values: list[float], sign: str = "") -> str:
    spread = f" ± {rounded(statistics.stdev(values))}" if len(values) > 1 else ""
    return rounded(statistics.mean(values), sign=sign) + spread


if __name__ == "__main__":
    main()
