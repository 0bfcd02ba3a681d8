"""Which class statistics tell old classes apart as features drift, on finished runs.

    python -m cl_merge.benchmarks.studies.drift_compensation runs/offline/*-10/seed*/sequential

Takes the task vectors that `cl-merge run` has left, merges them with MagMax task by task, and reads
the features of each task's training images under the base and the merged models of the time: once
at the published scale, and once at those that the run chose for ``magmax-drift``, if it did. Each
way then makes class statistics of them, without the images of earlier tasks but for the two marks,
and a linear discriminant classifies the test images. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.studies import harness
from cl_merge.class_statistics import (
    ClassGaussians,
    Discriminant,
    StreamStatistics,
    fused_map,
    unit,
)
from cl_merge.class_statistics.drift import HOLD, RIDGE
from cl_merge.mergers import get_merger
from cl_merge.task_vectors.module_weights import install, trained_parameters
from cl_merge.task_vectors.scales import Scales, scaled

_RIDGE = 2.0
_PROJECTIONS = 2000
# Crops of a task's images, and how much of the shorter side each has.
_CROPS, _SMALLEST, _LARGEST = 400, 0.35, 0.75

Features = list[Tensor]
"""Unit features of the training images of each task, float32 [N, D] each."""
LinearMap = tuple[Tensor, Tensor]
"""A and c of x A + c, float64 [D, D] and [D]."""


@dataclass
class Streamed:
    """The features of a finished run's images under the models that it had on its way."""

    classes: int
    head: Tensor  # rows of the text head, [C, D]
    labels: list[Tensor]  # of the training images of each task
    base: Features
    before: Features  # under the merged model before the images' own task
    merged: Features  # under the merged model after it
    final: Features  # under the merged model after the last task
    crops: list[Features]  # of each task: of crops of its images, under the first three models
    test_base: Tensor
    test_final: Tensor
    test_labels: Tensor


def main() -> None:
    """Measure every run, and print a table of means and spreads by setting."""
    settings = harness.runs_by_setting(
        __doc__, lambda run: {name: measure(read_run(run, of)) for name, of in _scales(run).items()}
    )
    columns = {
        f"{setting}, {name}": [run[name] for run in runs]
        for setting, runs in settings.items()
        for name in runs[0]
    }
    rows = []
    for name in next(iter(columns.values()))[0]:
        cells = [
            harness.mean_and_spread([run[name] for run in runs], 1) for runs in columns.values()
        ]
        rows.append([name, *cells])
    harness.show(None, ["classified by", *columns], rows)


def read_run(folder: Path, scales: Sequence[float | None]) -> Streamed:
    """Read all features of a finished run with sequential task vectors, at a scale for each task.

    None is the published scale.
    """
    evaluator = RunEvaluator.of(folder)
    model, stream, base = evaluator.model.eval(), evaluator.stream, evaluator.base
    live, merger = trained_parameters(model), get_merger("magmax")
    generator = torch.Generator().manual_seed(evaluator.config.seed)

    @torch.inference_mode()
    def read(batches: Iterable[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        pairs = [(unit(model.features(batch[0])), batch[1]) for batch in batches]
        return torch.cat([one for one, _ in pairs]), torch.cat([other for _, other in pairs])

    def training(task: int) -> tuple[Tensor, Tensor]:
        stream.select(task)
        return read(stream.task_dataloader())

    def crops_of(task: int) -> list[tuple[Tensor, Tensor]]:
        stream.select(task)
        images = torch.cat([batch[0] for batch in stream.task_dataloader()])
        chosen = torch.randint(len(images), (_CROPS,), generator=generator)
        crops = torch.cat([_crop(images[index], generator) for index in chosen])
        return [(part, part) for part in torch.split(crops, 64)]

    tasks = range(len(stream.tasks))
    at_base = [training(task) for task in tasks]
    test_base, test_labels = read(stream.test_dataloader())
    crops = [crops_of(task) for task in tasks]
    of_crops = [[read(crops[task])[0]] for task in tasks]
    before, merged = [], []
    for task, vector in enumerate(harness.task_vectors(folder)):
        before.append(training(task)[0])
        of_crops[task].append(read(crops[task])[0])
        merger.update(vector)
        scale = Scales.read(scales[task], merger.published_scale)
        install(live, scaled(base, merger.items(), scale))
        merged.append(training(task)[0])
        of_crops[task].append(read(crops[task])[0])
    return Streamed(
        classes=len(stream.class_names),
        head=model.head.weight.clone(),
        labels=[labels for _, labels in at_base],
        base=[features for features, _ in at_base],
        before=before,
        merged=merged,
        final=[training(task)[0] for task in tasks],
        crops=of_crops,
        test_base=test_base,
        test_final=read(stream.test_dataloader())[0],
        test_labels=test_labels,
    )


def measure(run: Streamed) -> dict[str, float]:
    """Classify a run's test images in every way; accuracies in per cent."""

    def accuracy(scores: Tensor) -> float:
        return 100.0 * float((scores.argmax(dim=1) == run.test_labels).double().mean())

    text = run.test_final @ run.head.T
    found = {"text head": accuracy(text)}
    for name, way in WAYS.items():
        features = run.test_base if name == "base features" else run.test_final
        found[name] = accuracy(Discriminant.of(way(run)).scores(features))
    for name, encoders in (("base", "base"), ("drift map", "merged"), ("both", "both")):
        learned, under = _learned(run, encoders), {"base": run.test_base, "merged": run.test_final}
        scores = [one.scores(under[key]) for key, one in learned.discriminants().items()]
        voted = learned.vote.combine(text.double(), torch.stack(scores).mean(dim=0))
        found[f"text + {name}"] = accuracy(voted)
        if encoders == "merged":
            turned = fused_map(learned.gaussians()["merged"], run.head, learned.vote)
            found["fused head"] = accuracy(unit(run.test_final.double() @ turned.T) @ run.head.T)
    # Random projections and a rectifier before the discriminant (RanPAC, NeurIPS 2023).
    generator = torch.Generator().manual_seed(0)
    rows = unit(torch.randn(_PROJECTIONS, run.head.shape[1], generator=generator))
    projected = _gaussians(run, [torch.relu(features @ rows.T) for features in run.base])
    of_test = torch.relu(run.test_base @ rows.T)
    found["random features of base"] = accuracy(Discriminant.of(projected).scores(of_test))
    return found


# Each makes the distributions that classify features of the final merged model, or of the base.
WAYS: dict[str, Callable[[Streamed], ClassGaussians]] = {
    # Of the base encoder, which does not drift: but a second encoder.
    "base features": lambda run: _gaussians(run, run.base),
    # Of the merged model as it was at each task, never touched again.
    "as they were": lambda run: _gaussians(run, run.merged),
    # The mean of what moved in the current task's images moves all old means.
    "mean shift": lambda run: _chained(run, _shift),
    # A ridge map from the features before a task to those after it moves all that is old.
    "chain of maps": lambda run: _chained(run, _ridge_map),
    # Base statistics through one ridge map to the final model.
    "one map, last task": lambda run: _mapped(run, run.base[-1:], run.merged[-1:]),
    # What `ClassStatistics` does: one map from the base, corrected by each task.
    "drift map": lambda run: _learned(run, "merged").gaussians()["merged"],
    # The means of the drift map and those of the chain, averaged: their errors differ.
    "3/4 drift map, 1/4 chain": lambda run: _averaged(_drifted(run), _chained(run, _ridge_map)),
    # Both with the maps also fitted on crops of the task's images.
    "drift map, with crops": lambda run: _drifted(run, crops=True),
    "3/4 drift map, 1/4 chain, with crops": lambda run: _averaged(
        _drifted(run, crops=True), _chained(run, _ridge_map, crops=True)
    ),
    # Marks, for which old images are needed.
    "one map, all images (mark)": lambda run: _mapped(run, run.base, run.final),
    "all images (mark)": lambda run: _gaussians(run, run.final),
}


def _learned(run: Streamed, encoders: str) -> StreamStatistics:
    """What `ClassStatistics` would keep of the run, and its vote."""
    kept = StreamStatistics(run.classes, run.head.shape[1], encoders)
    for base, merged, labels in zip(run.base, run.merged, run.labels, strict=True):
        kept.learn(base, merged, labels, merged @ run.head.T)
    return kept


def _gaussians(run: Streamed, features: Features) -> ClassGaussians:
    """The statistics of training images by class, of all tasks together."""
    vectors, labels = torch.cat(features).double(), torch.cat(run.labels)
    counts = torch.bincount(labels, minlength=run.classes).double()
    sums = torch.zeros(run.classes, vectors.shape[1], dtype=torch.float64)
    means = sums.index_add_(0, labels, vectors) / counts.clamp(min=1)[:, None]
    apart = vectors - means[labels]
    return ClassGaussians(counts, means, apart.T @ apart)


def _chained(
    run: Streamed, find: Callable[[Tensor, Tensor], LinearMap], *, crops: bool = False
) -> ClassGaussians:
    """Move the features of earlier tasks, task by task, by a map found on the task's images."""
    # The same as to move their means and scatter, for which no old image would be needed.
    moved: Features = []
    for task, after in enumerate(run.merged):
        _, before, target = _pairs(run, task, crops)
        moved = [*_moved(moved, find(before, target)), after.double()]
    return _gaussians(run, moved)


def _drifted(run: Streamed, *, crops: bool = False) -> ClassGaussians:
    """The drift map of `DriftCompensation`, applied image by image."""
    identity = torch.eye(run.head.shape[1], dtype=torch.float64)
    matrix, shift = identity, torch.zeros(len(identity), dtype=torch.float64)
    moved: Features = []
    for task, after in enumerate(run.merged):
        base, _, target = _pairs(run, task, crops)
        left = target - base @ matrix - shift
        centred = base - base.mean(dim=0)
        square = centred.T @ centred / len(base)
        penalty = RIDGE * square.diagonal().mean() * identity
        if task:
            penalty = penalty + HOLD * torch.cat(run.base[:task]).double().T.cov(correction=0)
        cross = centred.T @ (left - left.mean(dim=0)) / len(base)
        change = torch.linalg.solve(square + penalty, cross)
        offset = left.mean(dim=0) - base.mean(dim=0) @ change
        old = zip(run.base, moved, strict=False)
        moved = [now + before.double() @ change + offset for before, now in old]
        moved.append(after.double())
        matrix, shift = matrix + change, shift + offset
    return _gaussians(run, moved)


def _averaged(most: ClassGaussians, rest: ClassGaussians) -> ClassGaussians:
    """Distributions with three quarters of the means of some and one of those of others."""
    return replace(most, means=0.75 * most.means + 0.25 * rest.means)


def _pairs(run: Streamed, task: int, crops: bool) -> Features:
    """A task's features under base, previous merged and merged model, float64, with its crops."""
    own = [run.base[task], run.before[task], run.merged[task]]
    if crops:
        own = [torch.cat(pair) for pair in zip(own, run.crops[task], strict=True)]
    return [features.double() for features in own]


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of an image [3, S, S], enlarged to its size: [1, 3, S, S]."""
    size = image.shape[-1]
    share = _SMALLEST + (_LARGEST - _SMALLEST) * float(torch.rand(1, generator=generator))
    side = max(1, int(share * size))
    top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
    part = image[None, :, top : top + side, left : left + side]
    return F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)


def _scales(folder: Path) -> dict[str, list[float | None]]:
    """The scales to read a finished run at: for each task, by what they are called."""
    results = finished_results(folder)
    found: dict[str, list[float | None]] = {"published": [None] * len(results["tasks"])}
    lowered = results["methods"].get("magmax-drift")
    return found | ({"lowered": lowered["chosen_scales"]} if lowered else {})


def _mapped(run: Streamed, before: Features, after: Features) -> ClassGaussians:
    """The statistics of base features through the ridge map from some features to others."""
    return _gaussians(run, _moved(run.base, _ridge_map(torch.cat(before), torch.cat(after))))


def _moved(features: Features, by: LinearMap) -> Features:
    matrix, shift = by
    return [vectors.double() @ matrix + shift for vectors in features]


def _shift(before: Tensor, after: Tensor) -> LinearMap:
    """The identity and the mean of what moved."""
    identity = torch.eye(before.shape[1], dtype=torch.float64)
    return identity, (after - before).double().mean(dim=0)


def _ridge_map(before: Tensor, after: Tensor) -> LinearMap:
    """A and c of after = before A + c, drawn towards the identity."""
    before, after = before.double(), after.double()
    mean, target = before.mean(dim=0), after.mean(dim=0)
    centred = before - mean
    square = centred.T @ centred / len(before)
    identity = torch.eye(len(square), dtype=torch.float64)
    change = centred.T @ (after - before - (target - mean)) / len(before)
    strength = _RIDGE * square.diagonal().mean()
    matrix = identity + torch.linalg.solve(square + strength * identity, change)
    return matrix, target - mean @ matrix


if __name__ == "__main__":
    main()
