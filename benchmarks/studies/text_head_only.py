"""What lifts the text head alone: other merging and other training, without class statistics.

    python -m cl_merge.benchmarks.studies.text_head_only runs/offline/caltech101-10/seed*/sequential

Each way is compared with MagMax of plain sequential fine-tunings at its published scale, by the
accuracy of the merged model on all test images among all classes. Ways that merge differently use
the task vectors that `cl-merge run` has left; ways that train differently train anew with the
run's settings and seed. Scales are the published ones. 0.8 a layer was chosen for the learning rate
on training images that the runs of Caltech-101 do not use, and taken over for the scale. Two
constants were chosen on test images with seed 0: `ADAPTER_RATE`, of 1, 3 and 10, on digits, and
`DRIFT_WEIGHT`, of 10, 50, 500 and 5000, on digits, characters, TrashNet in 3 tasks and Caltech-101
in 20.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from cl_merge.benchmarks.datasets.loading import task_epochs
from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.studies import harness
from cl_merge.benchmarks.studies.drift_penalty import DriftPenalty
from cl_merge.benchmarks.studies.loss_model import LossModel, PerturbAndMerge, task_fisher
from cl_merge.benchmarks.studies.low_rank import Perturbation, adapted, add_adapters
from cl_merge.callbacks import MergeCallback
from cl_merge.data.task_stream import TaskStream
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError
from cl_merge.mergers import Merger, get_merger, merge
from cl_merge.models.classifier import CLIPClassifier, layer_depths
from cl_merge.task_vectors.module_weights import install, swapped, trained_parameters
from cl_merge.task_vectors.task_vector import TaskVector
from cl_merge.training.fit import TaskEnd, fit_stream

DECAY = 0.8
ADAPTER_RATE = 3.0  # the learning rate of adapters, in that of the run
DRIFT_WEIGHT = 50.0  # of `DriftPenalty`
PLAIN = "magmax"

Vectors = list[TaskVector]
Fishers = list[dict[str, Tensor]]
"""By task, the diagonal of the Fisher information at the task's weights on its own images."""

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
    fishers: Fishers = []
    for name in WAYS if ways is None else ways:
        if name in MERGING:
            change = MERGING[name](vectors)
        elif name in WEIGHING:
            fishers = fishers or fishers_of(evaluator, vectors)
            change = WEIGHING[name](vectors, fishers)
        else:
            change = TRAINING[name](evaluator)
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


# Ways to merge that weigh by the Fisher information.


def fishers_of(evaluator: RunEvaluator, vectors: Vectors) -> Fishers:
    """Estimate the Fisher information of each task of a run, at the weights that it left."""
    model, stream, found = evaluator.model, evaluator.stream, []
    live = trained_parameters(model)
    for task, vector in zip(stream.tasks, vectors, strict=True):
        stream.select(task.index)
        with swapped(live, vector.apply_to(evaluator.base)):
            found.append(task_fisher(model, stream, live))
    return found


def perturb_and_merge(vectors: Vectors, fishers: Fishers) -> Change:
    """Merge as P&M does, but fine-tunings that started from each other."""
    merger = PerturbAndMerge()
    for vector, fisher in zip(vectors, fishers, strict=True):
        merger.update(vector, fisher)
    return merger.merged


def fisher_scale(vectors: Vectors, fishers: Fishers) -> Change:
    """MagMax with the scale at which the loss model of P&M is least."""
    loss, merged = LossModel(), dict(merge(vectors, PLAIN))
    for vector, fisher in zip(vectors, fishers, strict=True):
        loss.update(vector, fisher)
    scale = loss.step({name: torch.zeros_like(value) for name, value in merged.items()}, merged)
    return {name: scale * value for name, value in merged.items()}


WEIGHING: dict[str, Callable[[Vectors, Fishers], Change]] = {
    "MagMax at the scale of least Fisher loss": fisher_scale,
    "P&M, sequential": perturb_and_merge,
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
    fit(evaluator, model, [callback])
    return callback


def fit(
    evaluator: RunEvaluator,
    model: CLIPClassifier,
    callbacks: Sequence[Callback] = (),
    on_task_end: Callable[[TaskEnd], None] | None = None,
) -> None:
    """Train a model on a run's stream, with the run's seed and its arguments of trainers."""
    config, stream = evaluator.config, evaluator.stream
    epochs = task_epochs(config, len(stream.tasks))

    def trainer(task: Task) -> L.Trainer:
        return L.Trainer(**harness.QUIET | config.trainer | {"max_epochs": epochs[task.index]})

    fit_stream(
        model,
        stream,
        callbacks=callbacks,
        trainer=trainer,
        evaluate=False,
        seed=config.seed,
        on_task_end=on_task_end,
    )


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


def new_model(evaluator: RunEvaluator, rate: float = 1.0) -> CLIPClassifier:
    """Make a model of its own with the pre-trained weights, and a share of the learning rate."""
    options = asdict(evaluator.config.optimizer)
    visual = copy.deepcopy(evaluator.model.visual)
    model = CLIPClassifier(visual, evaluator.model.head, **options | {"lr": rate * options["lr"]})
    model.load_state_dict(evaluator.base, strict=False)
    return model


def merged_factors(evaluator: RunEvaluator) -> Change:
    """MagMax of the factors of adapters, each task starting from the merged ones.

    Reference:
        Tran et al., LCA: Local Classifier Alignment for Continual Learning, ICLR 2026: the merging.
    """
    model = new_model(evaluator, ADAPTER_RATE)
    torch.manual_seed(evaluator.config.seed)
    adapters = add_adapters(model)
    callback = MergeCallback(PLAIN, start="merged", scale=1.0)
    fit(evaluator, model, [callback])
    callback.install(model)
    with torch.no_grad():
        return {
            name: adapter(torch.zeros_like(adapted(model, name)))
            for name, adapter in adapters.items()
        }


def trained_from_merged(
    evaluator: RunEvaluator,
    merger: Merger | PerturbAndMerge,
    *,
    low_rank: bool = False,
    perturbed: bool = False,
) -> Change:
    """Train each task from the merged model, all parameters or adapters, and merge the weights.

    What a task's adapters add becomes part of the weights, and the next task has new ones.
    """
    model, base = new_model(evaluator, ADAPTER_RATE if low_rank else 1.0), evaluator.base
    torch.manual_seed(evaluator.config.seed)
    adapters = add_adapters(model) if low_rank else {}
    weights = {name: adapted(model, name) for name in adapters} or trained_parameters(model)

    def merge_task(_: TaskEnd) -> None:
        with torch.no_grad():
            for name, adapter in adapters.items():
                weights[name].copy_(adapter(weights[name]))
                adapter.reset()
        vector = {name: value.detach() - base[name] for name, value in weights.items()}
        if isinstance(merger, PerturbAndMerge):
            merger.update(vector, task_fisher(model, evaluator.stream, weights))
        else:
            merger.update(vector)
        install(weights, {name: base[name] + value for name, value in merger.items()})

    callbacks = [Perturbation(adapters, evaluator.config.seed)] if perturbed else []
    fit(evaluator, model, callbacks, merge_task)
    return dict(merger.items())


def drift_penalty(evaluator: RunEvaluator, *, merged: bool) -> Change:
    """Train with a penalty on the drift of features, and merge by MagMax or not at all."""
    model = new_model(evaluator)
    penalty = DriftPenalty(model, DRIFT_WEIGHT, evaluator.config.seed)
    callback = MergeCallback(PLAIN)
    fit(evaluator, model, [penalty, callback])
    if not merged:
        return dict(callback.task_vector(model))
    return {name: callback.merger.published_scale * v for name, v in callback.merger.items()}


TRAINING: dict[str, Callable[[RunEvaluator], Change]] = {
    "start=merged": partial(trained_anew, start="merged"),
    "cross entropy over classes seen": partial(trained_anew, kind=SeenClasses),
    "layer_decay": partial(trained_anew, layer_decay=DECAY),
    "P&M, merged": lambda run: trained_from_merged(run, PerturbAndMerge()),
    "LoRA, factors": merged_factors,
    "LoRA, products": lambda run: trained_from_merged(run, get_merger(PLAIN), low_rank=True),
    "LoRA, P&M": lambda run: trained_from_merged(run, PerturbAndMerge(), low_rank=True),
    "LoRA, P&M, perturbed": lambda run: trained_from_merged(
        run, PerturbAndMerge(), low_rank=True, perturbed=True
    ),
    "drift penalty": partial(drift_penalty, merged=True),
    "drift penalty, not merged": partial(drift_penalty, merged=False),
}

WAYS = (*MERGING, *WEIGHING, *TRAINING)


if __name__ == "__main__":
    main()
