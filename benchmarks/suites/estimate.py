"""How long a suite will take: images counted, seconds per image measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.epochs import task_epochs
from cl_merge.benchmarks.methods.method import LEARNING_COST, TRAININGS, find_method
from cl_merge.benchmarks.runs.results import read_results
from cl_merge.benchmarks.suites.plan import Job, job_config
from cl_merge.config.schema import RunConfig

_TRAIN_COST = 3  # forward and backward, in forward passes
_LWF_COST = 4  # that, and a forward pass of the former model
_TIMING_SECONDS = 1.0


@dataclass(frozen=True)
class Size:
    """Images of a run.

    Attributes:
        train: To train on, over all tasks.
        test: To test on.
        tasks: Number of tasks.
    """

    train: int
    test: int
    tasks: int


def estimate(jobs: Sequence[Job], folder: Path) -> dict[str, float | None]:
    """Estimate how long jobs take, each by itself on this machine.

    What has finished in the suite's folder tells how fast a model is; if nothing has, a few images
    of noise are timed.

    Args:
        jobs: All jobs of a suite, finished ones among them.
        folder: The suite's.

    Returns:
        Seconds by the job's place; None where the size of the data is not known.
    """
    configs = {job.place: job_config(job) for job in jobs}
    sizes: dict[str, Size] = {}
    rates: dict[tuple[Any, ...], list[float]] = {}
    for job in jobs:
        if (found := read_results(folder / job.place)) is not None:
            size, config = _size_of_results(found), configs[job.place]
            sizes[job.setting.data] = size
            done = passes(job, config, size)
            rates.setdefault(_kind(config), []).append(found["total"]["seconds"] / done)
    estimates: dict[str, float | None] = {}
    for job in jobs:
        config = configs[job.place]
        known = sizes.get(job.setting.data) or _size_of_facts(config)
        if known is None:
            estimates[job.place] = None
            continue
        kind = _kind(config)
        if kind not in rates:
            rates[kind] = [seconds_per_pass(config.model, config.image_size)]
        tasks = config.stream.tasks or known.tasks
        number = passes(job, config, Size(known.train, known.test, tasks))
        estimates[job.place] = median(rates[kind]) * number
    return estimates


def passes(job: Job, config: RunConfig, size: Size) -> int:
    """Count the images that go through the model in a job, a forward pass each.

    Args:
        job: The job.
        config: Of its run.
        size: Of its data.

    Returns:
        The number; a training step on an image counts as three, with LwF as four.
    """
    joint = TRAININGS[job.training].joint
    methods = [find_method(word) for word in (config.method, *config.compare)]
    rows = 1 if joint or config.evaluate == "last" else size.tasks
    epochs: list[int] = task_epochs(config, size.tasks)
    cost = _LWF_COST if job.training == "lwf" else _TRAIN_COST
    evaluations = 1 + rows * sum(method.encoders for method in methods)
    learning = LEARNING_COST * sum(method.statistics is not None for method in methods)
    train = sum(epochs) // len(epochs) * cost + learning
    return size.test * evaluations + size.train * train


def seconds_per_pass(model: str, image_size: int | None) -> float:
    """Time the image tower of a model on noise, with whatever weights.

    Args:
        model: As for ``cl-merge run model=``.
        image_size: Height and width in pixels; None for the model's own.

    Returns:
        Seconds of a forward pass of one image.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower, size = _tower(model, image_size)
    tower = tower.to(device).eval()
    images = torch.randn(64 if device == "cuda" else 8, 3, size, size, device=device)
    times: list[float] = []
    with torch.inference_mode():
        # A machine with other work stalls a short pass many times over: the best of many counts.
        while len(times) < 3 or (sum(times) < _TIMING_SECONDS and len(times) < 100):
            begin = time.perf_counter()
            tower(images).sum().item()
            times.append(time.perf_counter() - begin)
    return min(times) / len(images)


def _tower(model: str, image_size: int | None) -> tuple[torch.nn.Module, int]:
    from cl_merge.models.pretrained import load_clip

    name = model.partition(":")[0]
    if name in ("glyph", "lite", "local-dir"):
        clip = load_clip(model, image_size=image_size)
        made: Any = clip.model
        return made.visual, clip.image_size
    # The architecture is enough: weights would have to be downloaded.
    import open_clip

    logging.disable(logging.WARNING)  # it warns that there are no weights
    try:
        made = open_clip.create_model(name, force_image_size=image_size)
    finally:
        logging.disable(logging.NOTSET)
    size = made.visual.image_size
    return made.visual, int(size[0] if isinstance(size, (tuple, list)) else size)


def _kind(config: RunConfig) -> tuple[Any, ...]:
    trainer = config.trainer
    return config.model, config.image_size, trainer.get("precision"), trainer.get("devices")


def _size_of_facts(config: RunConfig) -> Size | None:
    facts: Mapping[str, int] = find_data(config.data).facts
    if "train" not in facts or "test" not in facts:
        return None
    train, limit = facts["train"], config.stream.images_per_class
    if limit is not None and "classes" in facts:
        train = min(train, limit * facts["classes"])
    tasks = config.stream.tasks or facts.get("domains") or facts.get("tasks") or 1
    return Size(train, facts["test"], tasks)


def _size_of_results(results: Mapping[str, Any]) -> Size:
    tasks = results["tasks"]
    train, test = (sum(task[f"{key}_images"] for task in tasks) for key in ("train", "test"))
    return Size(train, test, len(tasks))
