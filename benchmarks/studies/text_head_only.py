"""What lifts the text head alone: other merging and other training, without class statistics.

    python -m cl_merge.benchmarks.studies.text_head_only runs/offline/caltech101-10/seed*/sequential

Each way is compared with MagMax of plain sequential fine-tunings at its published scale, by the
accuracy of the merged model on all test images among all classes. Ways that merge differently use
the task vectors that `cl-merge run` has left; ways that train differently train anew with the
run's settings and seed. Scales are the published ones. 0.8 a layer was chosen for the learning rate
on training images that the runs of Caltech-101 do not use, and taken over for the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.benchmarks.datasets.loading import task_epochs
from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.studies import harness
from cl_merge.callbacks import MergeCallback
from cl_merge.data.task_stream import TaskStream
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError
from cl_merge.mergers import get_merger, merge
from cl_merge.models.classifier import CLIPClassifier, layer_depths
from cl_merge.task_vectors.task_vector import TaskVector
from cl_merge.training.fit import fit_stream

DECAY = 0.8
PLAIN = "magmax"

Vectors = list[TaskVector]
Change = dict[str, Tensor]
"""By parameter, what is added to the pre-trained weights, its scale in it."""


def main() -> None:
    """Measure every run, and print each way with its difference to the plain one, by setting."""
    settings = harness.runs_by_setting(__doc__, measure)
    rows = []
    for name in WAYS:
        cells = []
        for runs in settings.values():
            cells.append(harness.mean_and_spread([run[name] for run in runs], 1))
            if name != PLAIN:
                gains = [run[name] - run[PLAIN] for run in runs]
                cells[-1] += "  " + harness.mean_and_spread(gains, 1, "+")
        rows.append([name, *cells])
    harness.show(None, ["way", *settings], rows)


def measure(folder: Path, ways: Iterable[str] | None = None) -> dict[str, float]:
    """Measure a finished sequential run in some ways, or in all; accuracies in per cent."""
    evaluator, found = RunEvaluator.of(folder), {}
    vectors: Vectors = list(harness.task_vectors(folder))
    for name in WAYS if ways is None else ways:
        change = MERGING[name](vectors) if name in MERGING else TRAINING[name](evaluator)
        found[name] = evaluator.accuracy(change.items(), 1.0)
        if name == PLAIN:
            expected = finished_results(folder)["methods"][PLAIN]["accuracy"]
            if abs(found[name] - expected) > 1e-6:
                raise InputError(
                    f"'{folder}': MagMax of its task vectors has {found[name]:.4f} % here, but "
                    f"results.json says {expected:.4f}; expected the images and the number of "
                    "threads of the run"
                )
    return found


# Ways to merge.


def merged_by(method: str, vectors: Vectors) -> Change:
    """Merge by a method at its published scale."""
    scale = get_merger(method).published_scale
    return {name: scale * value for name, value in merge(vectors, method).items()}


def mean_over_time(vectors: Vectors) -> Change:
    """The mean of the models that MagMax has after each task."""
    merger = get_merger(PLAIN)
    total = {name: torch.zeros_like(value) for name, value in vectors[0].items()}
    for vector in vectors:
        merger.update(vector)
        for name, value in merger.items():
            total[name] += merger.published_scale * value / len(vectors)
    return total


def sign_consistency(vectors: Vectors) -> Change:
    """MagMax, each element times the share of the tasks' total magnitude that has one sign.

    The share is ``abs(sum) / sum(abs)``: 1 where all tasks agree, 0 where they cancel out.
    """
    found = {}
    for name, value in merged_by(PLAIN, vectors).items():
        stacked = torch.stack([vector[name] for vector in vectors])
        share = stacked.sum(dim=0).abs() / stacked.abs().sum(dim=0).clamp(min=1e-30)
        found[name] = value * share
    return found


def layer_scales(vectors: Vectors) -> Change:
    """MagMax with a scale that falls by `DECAY` from each layer to the one before it."""
    depths = layer_depths(vectors[0])
    last, found = max(depths.values()), merged_by(PLAIN, vectors)
    return {name: value * DECAY ** (last - depths[name]) for name, value in found.items()}


MERGING: dict[str, Callable[[Vectors], Change]] = {
    PLAIN: partial(merged_by, PLAIN),
    "mean of merged models over time": mean_over_time,
    "ema": partial(merged_by, "ema"),
    "opcm": partial(merged_by, "opcm"),
    "sign consistency": sign_consistency,
    "scale falls towards early layers": layer_scales,
}


# Ways to train.


def trained_anew(evaluator: RunEvaluator, **options: Any) -> Change:
    """MagMax at its published scale, of a run's stream trained anew."""
    merger = train(evaluator, **options).merger
    return {name: merger.published_scale * value for name, value in merger.items()}


def train(
    evaluator: RunEvaluator,
    *,
    start: str = "sequential",
    kind: type[CLIPClassifier] = CLIPClassifier,
    layer_decay: float = 1.0,
) -> MergeCallback:
    """Train a run's stream anew, with the run's settings but for what is given.

    The model of the evaluator is trained, from the pre-trained weights, with the loss of a kind of
    classifier. Returns what merged the task vectors.
    """
    options = asdict(evaluator.config.optimizer) | {"layer_decay": layer_decay}
    model = kind(evaluator.model.visual, evaluator.model.head, **options)
    model.load_state_dict(evaluator.base, strict=False)
    callback = MergeCallback(PLAIN, start=start)
    config, stream = evaluator.config, evaluator.stream
    epochs = task_epochs(config, len(stream.tasks))

    def trainer(task: Task) -> L.Trainer:
        return L.Trainer(**harness.QUIET | config.trainer | {"max_epochs": epochs[task.index]})

    fit_stream(
        model, stream, callbacks=[callback], trainer=trainer, evaluate=False, seed=config.seed
    )
    return callback


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


TRAINING: dict[str, Callable[[RunEvaluator], Change]] = {
    "start=merged": partial(trained_anew, start="merged"),
    "cross entropy over classes seen": partial(trained_anew, kind=SeenClasses),
    "layer_decay": partial(trained_anew, layer_decay=DECAY),
}

WAYS = (*MERGING, *TRAINING)


if __name__ == "__main__":
    main()
