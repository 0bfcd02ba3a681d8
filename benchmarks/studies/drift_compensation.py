"""Which class statistics tell old classes apart: ways to carry them, on finished runs.

    python -m cl_merge.benchmarks.studies.drift_compensation runs/offline/*-10/seed*/sequential

Takes the task vectors that `cl-merge run` has left, merges them with MagMax task by task, and reads
the features of each task's training images under the base and the merged models of the time. Each
way then makes class statistics of them, without the images of earlier tasks but for the two marks,
and a linear discriminant classifies the test images. Nothing is trained.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.studies.store_accuracy import mean_and_spread, task_vectors
from cl_merge.class_statistics import (
    ClassGaussians,
    Discriminant,
    FeatureMoments,
    StreamStatistics,
    fused_map,
    unit,
)
from cl_merge.mergers import get_merger
from cl_merge.task_vectors.module_weights import install, trained_parameters
from cl_merge.task_vectors.scales import Scales, scaled


@dataclass
class Streamed:
    """Unit features of a run's images, float32 [N, D], and their labels, int64 [N].

    Attributes:
        classes: Number of classes.
        head: Rows of the text head, [C, D].
        labels: Of each task's training images.
        base: Those under the base.
        before: Those under the merged model before the task.
        merged: Those under the merged model after it.
        final: Those under the merged model after the last task.
        test: Test images under base and final merged model, and their labels.
    """

    classes: int
    head: Tensor
    labels: list[Tensor]
    base: list[Tensor]
    before: list[Tensor]
    merged: list[Tensor]
    final: list[Tensor]
    test: tuple[Tensor, Tensor, Tensor]


def read_run(folder: Path) -> Streamed:
    """Read all features that any way asks for.

    Args:
        folder: Of a finished run with sequential task vectors.

    Returns:
        The features.
    """
    replay = RunEvaluator.of(folder)
    model, stream, base = replay.model.eval(), replay.stream, replay.base
    live, merger = trained_parameters(model), get_merger("magmax")

    @torch.inference_mode()
    def read(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        pairs = [(unit(model.features(images)), labels) for images, labels in batches]
        return torch.cat([one for one, _ in pairs]), torch.cat([other for _, other in pairs])

    def training(task: int) -> tuple[Tensor, Tensor]:
        stream.select(task)
        return read((batch[0], batch[1]) for batch in stream.task_dataloader())

    def testing() -> tuple[Tensor, Tensor]:
        return read((batch[0], batch[1]) for batch in stream.test_dataloader())

    tasks = range(len(stream.tasks))
    at_base, (test_base, test_labels) = [training(task) for task in tasks], testing()
    before, merged = [], []
    for task, vector in enumerate(task_vectors(folder / "task_vectors" / "sequential")):
        before.append(training(task)[0])
        merger.update(vector)
        install(live, scaled(base, merger.items(), Scales.read(None, merger.published_scale)))
        merged.append(training(task)[0])
    final = [training(task)[0] for task in tasks]
    return Streamed(
        classes=len(stream.class_names),
        head=model.head.weight.clone(),
        labels=[labels for _, labels in at_base],
        base=[features for features, _ in at_base],
        before=before,
        merged=merged,
        final=final,
        test=(test_base, testing()[0], test_labels),
    )


# The ways: each makes the distributions that classify features of the final merged model, or of
# the base.


def base_features(run: Streamed) -> ClassGaussians:
    """Of the base encoder: nothing to carry, but a second encoder."""
    return pooled(run, run.base)


def all_images(run: Streamed) -> ClassGaussians:
    """A mark: of the final merged model, with all old images at hand."""
    return pooled(run, run.final)


def as_they_were(run: Streamed) -> ClassGaussians:
    """Of the merged model as it was at each task, never touched again."""
    return pooled(run, run.merged)


def shifted(run: Streamed) -> ClassGaussians:
    """The mean of what moved in the current task's images moves all old means."""
    return _chained(run, None)


def chained(run: Streamed) -> ClassGaussians:
    """A ridge map from the features before a task to those after it moves all that is old."""
    return _chained(run, 2.0)


def one_map(run: Streamed) -> ClassGaussians:
    """Base statistics through one ridge map to the final model, from the last task's images."""
    return _through(run, run.base[-1], run.merged[-1])


def one_map_of_all(run: Streamed) -> ClassGaussians:
    """A mark: the same map from the images of all tasks."""
    return _through(run, torch.cat(run.base), torch.cat(run.final))


def carried(run: Streamed) -> ClassGaussians:
    """What `DriftCompensation` does: one map from the base, corrected by each task."""
    return _learned(run, "merged").gaussians()["merged"]


WAYS: dict[str, Callable[[Streamed], ClassGaussians]] = {
    "base features": base_features,
    "as they were": as_they_were,
    "mean shift": shifted,
    "chain of maps": chained,
    "one map, last task": one_map,
    "carried": carried,
    "one map, all images (mark)": one_map_of_all,
    "all images (mark)": all_images,
}


def measure(folder: Path) -> dict[str, float]:
    """Classify a run's test images in every way.

    Args:
        folder: Of the run.

    Returns:
        Accuracy on all test images in per cent, by way.
    """
    run = read_run(folder)
    base, final, labels = run.test
    text = final @ run.head.T
    found = {"text head": _accuracy(text, labels)}
    for name, way in WAYS.items():
        features = base if way is base_features else final
        found[name] = _accuracy(Discriminant.of(way(run)).scores(features), labels)
    for name, encoders in (("base", "base"), ("carried", "merged"), ("both", "both")):
        learned = _learned(run, encoders)
        of = {"base": base, "merged": final}
        scores = [one.scores(of[key]) for key, one in learned.discriminants().items()]
        voted = learned.vote.combine(text.double(), torch.stack(scores).mean(dim=0))
        found[f"text + {name}"] = _accuracy(voted, labels)
        if name == "carried":
            turned = fused_map(learned.gaussians()["merged"], run.head, learned.vote)
            found["aligned"] = _accuracy(unit(final.double() @ turned.T) @ run.head.T, labels)
    found["random features of base"] = _random_features(run)
    return found


def pooled(run: Streamed, features: list[Tensor]) -> ClassGaussians:
    """Statistics of vectors of all tasks together."""
    moments = FeatureMoments(run.classes, features[0].shape[1])
    for vectors, labels in zip(features, run.labels, strict=True):
        moments.update(vectors, labels)
    return ClassGaussians.of(moments)


def main() -> None:
    """Measure every run, and print a table of means and spreads by setting."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    logging.getLogger("lightning").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    arguments = parser.parse_args()
    settings: dict[str, list[dict[str, float]]] = {}
    for folder in arguments.runs:
        settings.setdefault(folder.resolve().parts[-3], []).append(measure(folder))
    table = Table("classified by", *settings, box=box.SIMPLE_HEAD)
    for name in next(iter(settings.values()))[0]:
        table.add_row(
            name, *(mean_and_spread([run[name] for run in runs]) for runs in settings.values())
        )
    Console(width=40 + 20 * len(settings)).print(table)


def _learned(run: Streamed, encoders: str) -> StreamStatistics:
    """What `ClassStatistics` would keep of the run, and its vote."""
    kept = StreamStatistics(run.classes, run.head.shape[1], encoders)
    for before, after, labels in zip(run.base, run.merged, run.labels, strict=True):
        kept.learn(before, after, labels, after @ run.head.T)
    return kept


def _ridge(before: Tensor, after: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """A and c of after = before A + c, drawn towards the identity."""
    before, after = before.double(), after.double()
    mean, target = before.mean(dim=0), after.mean(dim=0)
    centred = before - mean
    square = centred.T @ centred / len(before)
    identity = torch.eye(len(square), dtype=torch.float64)
    change = centred.T @ (after - before - (target - mean)) / len(before)
    matrix = identity + torch.linalg.solve(
        square + ridge * square.diagonal().mean() * identity, change
    )
    return matrix, target - mean @ matrix


def _moved(old: ClassGaussians, matrix: Tensor, shift: Tensor) -> ClassGaussians:
    means = (old.means @ matrix + shift) * old.seen[:, None]
    return ClassGaussians(old.counts, means, matrix.T @ old.scatter @ matrix)


def _chained(run: Streamed, ridge: float | None) -> ClassGaussians:
    found = None
    parts = zip(run.before, run.merged, run.labels, strict=True)
    for before, after, labels in parts:
        moments = FeatureMoments(run.classes, after.shape[1])
        moments.update(after, labels)
        new = ClassGaussians.of(moments)
        if found is None:
            found = new
            continue
        if ridge is None:
            matrix = torch.eye(after.shape[1], dtype=torch.float64)
            shift = (after - before).double().mean(dim=0)
        else:
            matrix, shift = _ridge(before, after, ridge)
        found = _together(_moved(found, matrix, shift), new)
    assert found is not None  # noqa: S101 - a run has a task
    return found


def _through(run: Streamed, before: Tensor, after: Tensor) -> ClassGaussians:
    return _moved(pooled(run, run.base), *_ridge(before, after, 2.0))


def _together(one: ClassGaussians, other: ClassGaussians) -> ClassGaussians:
    total = one.counts + other.counts
    apart = other.means - one.means
    pairs = (one.counts * other.counts / total.clamp(min=1))[:, None]
    means = one.means + apart * (other.counts / total.clamp(min=1))[:, None]
    return ClassGaussians(total, means, one.scatter + other.scatter + (pairs * apart).T @ apart)


def _random_features(run: Streamed, number: int = 2000) -> float:
    """Random projections and a rectifier before the discriminant (RanPAC, NeurIPS 2023)."""
    generator = torch.Generator().manual_seed(0)
    weight = unit(torch.randn(number, run.head.shape[1], generator=generator)).T
    statistics = pooled(run, [torch.relu(vectors @ weight) for vectors in run.base])
    scores = Discriminant.of(statistics).scores(torch.relu(run.test[0] @ weight))
    return _accuracy(scores, run.test[2])


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return 100.0 * float((scores.argmax(dim=1) == labels).double().mean())


if __name__ == "__main__":
    main()
