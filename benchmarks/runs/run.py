"""One run: a stream from end to end, with every method beside it that shares its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.epochs import task_epochs
from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.methods.method import (
    LEARNING_COST,
    TRAININGS,
    Method,
    find_method,
    methods_beside,
)
from cl_merge.benchmarks.runs.loggers import check_loggers
from cl_merge.benchmarks.runs.run_folder import RunFolder
from cl_merge.callbacks import EWC, LwF, MergeCallback
from cl_merge.callbacks.auto_scale import AutoScale
from cl_merge.callbacks.regularizer import Regularizer
from cl_merge.config.reading import settings_named
from cl_merge.config.schema import HELD_OUT, RunConfig
from cl_merge.data.task_stream import TaskStream, check_loading
from cl_merge.errors import InputError, unknown_name
from cl_merge.kernels.parallel import usable_cores
from cl_merge.mergers import Merger, get_merger
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.task_vectors.module_weights import copies, floating_buffers, trained_parameters
from cl_merge.task_vectors.scales import Scales
from cl_merge.training.cost import Cost
from cl_merge.training.metrics import AccuracyMatrix


@dataclass
class Run:
    """A run in progress, and what it has found.

    Attributes:
        config: What was asked for.
        folder: Where it writes, and where it finds what it did before it was stopped.
        stream: The tasks.
        model: The model, with the weights of the moment.
        base: The pre-trained weights, by parameter name.
        buffers: The floating-point buffers of the pre-trained model, by name.
        matrices: The accuracy matrix of every method.
        scales: The scale of every method that merges.
        chosen: The scale after each task, of a method that chooses it.
        costs: What each task's training took, by training.
        cost: What the whole run took.
    """

    config: RunConfig
    folder: RunFolder
    stream: TaskStream
    model: CLIPClassifier
    base: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    scales: dict[str, Scales] = field(default_factory=dict)
    chosen: dict[str, list[Scales]] = field(default_factory=dict)
    costs: dict[str, list[Cost]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @cached_property
    def own(self) -> Method:
        """The method that the run is about."""
        return find_method(self.config.method)

    @cached_property
    def methods(self) -> list[Method]:
        """The methods of this run, in the order of the tables."""
        return methods_beside(self.config.method, self.config.compare)

    @property
    def trainings(self) -> dict[str, list[Method]]:
        """The trainings of this run, each with the methods that share it."""
        return {
            name: methods
            for name in TRAININGS
            if (methods := [method for method in self.methods if method.training == name])
        }

    def rows(self, training: str) -> list[int]:
        """After which tasks of a training its methods are evaluated.

        Args:
            training: Its name.

        Returns:
            Indices of tasks in the training's own stream.
        """
        tasks = 1 if TRAININGS[training].joint else len(self.stream.tasks)
        return list(range(tasks))[0 if self.config.evaluate == "every" else -1 :]

    def new_matrix(self, method: str) -> AccuracyMatrix:
        """Begin the accuracy matrix of a method, with the rows that the folder has already.

        Args:
            method: Its name.

        Returns:
            The matrix, which is also in `matrices`.
        """
        classes = [task.classes for task in self.stream.tasks]
        matrix = AccuracyMatrix(classes, len(self.stream.class_names))
        matrix.rows |= self.folder.rows(method)
        self.matrices[method] = matrix
        return matrix


def start_run(config: RunConfig) -> Run:
    """Check a configuration, load what it names and claim its folder; trains nothing yet.

    Args:
        config: What to run.

    Returns:
        The run; its folder is held until ``run.folder.release()``.

    Raises:
        InputError: If anything in the configuration cannot work, or another process holds the
            folder.
    """
    method = find_method(config.method)
    _try_settings(config, method)
    _check_devices(config)
    stream, model = load_parts(config)
    merge_callback(config, method).check_names(trained_parameters(model))
    data = find_data(config.data).name
    name = f"{data.strip('/').split('/')[-1]}-{method.name.replace('/', '-')}"
    folder = RunFolder.claim(config, name)
    base, buffers = copies(trained_parameters(model)), copies(floating_buffers(model))
    return Run(config, folder, stream, model, base, buffers)


def _check_devices(config: RunConfig) -> None:
    """Refuse more processes than a machine without a GPU has cores for: memory goes first."""
    devices, most = config.trainer.get("devices"), max(usable_cores(), 2)
    on_cpu = config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    if on_cpu and type(devices) is int and devices > most:
        raise InputError(
            f"trainer.devices={devices}; expected at most {most}: without a GPU each is a process "
            "with a model of its own, and more than there are cores gain nothing"
        )


def count_batches(run: Run, train_cost: int = 3) -> int:
    """Count the batches that a run has still to do, a training batch as several of evaluation.

    Args:
        run: A run that has been started.
        train_cost: What a training batch costs, in evaluation batches.

    Returns:
        The number; an estimate where the trainer is told to stop early, or a run was stopped in the
        middle of a task.
    """
    size, tasks = run.stream.batch_size, run.stream.tasks
    test = -(-sum(len(task.test) for task in tasks) // size)
    batches = [-(-len(task.train) // size) for task in tasks]
    epochs = task_epochs(run.config, len(tasks))
    steps = [count * (of_task or 1) for count, of_task in zip(batches, epochs, strict=True)]
    joint = [sum(batches) * (run.config.trainer.get("max_epochs") or 1)]
    total = 0 if run.folder.rows("zero-shot") else test
    for name, methods in run.trainings.items():
        of_task, rows = joint if TRAININGS[name].joint else steps, len(run.rows(name))
        finished = run.folder.finished_tasks(name, len(of_task))
        total += train_cost * sum(n for task, n in enumerate(of_task) if task not in finished)
        for method in methods:
            left = rows - len(run.folder.rows(method.name))
            total += test * method.encoders * left
            if method.statistics is not None:
                total += LEARNING_COST * sum(batches) * left // rows
    return total


def make_regularizer(config: RunConfig, name: str) -> Regularizer:
    """Make the callback that a training is regularized with.

    Args:
        config: Holds its options.
        name: ``"lwf"`` or ``"ewc"``.

    Returns:
        A fresh callback.
    """
    return (
        LwF(**asdict(config.lwf)) if name == "lwf" else EWC(**asdict(config.ewc), seed=config.seed)
    )


def merge_callback(
    config: RunConfig,
    method: Method | None,
    *,
    start: str = "sequential",
    directory: Path | None = None,
) -> MergeCallback:
    """Make the callback that merges in a training.

    Args:
        config: Holds its options. Those of the method are for the run's own; another one merges as
            it was published.
        method: What it merges with; without one that merges, only its task vectors are of use.
        start: Where each task starts to train.
        directory: Where it writes the task vectors.

    Returns:
        A fresh callback.

    Raises:
        InputError: If an option is wrong.
    """
    options = config.merge
    merger, scale = (
        make_merger(config, method)
        if method is not None and method.merger
        else (get_merger("magmax"), None)
    )
    return MergeCallback(
        merger,
        scale=AutoScale(options.groups) if scale == "auto" else scale,
        start=start,
        buffers=options.buffers,
        include=options.include,
        exclude=options.exclude,
        store=options.store,
        directory=directory,
        device=options.device,
        importance_samples=options.importance_samples,
    )


def make_merger(config: RunConfig, method: Method) -> tuple[Merger, Any]:
    """Make the merger of one of a run's methods as the run configures it.

    Args:
        config: Holds the options: those of ``merge`` are for the run's own method, those of
            ``merge.beside`` for the others.
        method: A method that merges.

    Returns:
        A fresh merger, and the scale that is asked for, None for the published one.

    Raises:
        InputError: If an option is wrong.
    """
    options = config.merge
    if method.plain != find_method(config.method).plain:
        given = dict(options.beside.get(method.plain.name) or {})
        scale = given.pop("scale", None)
        Scales.read(scale, 1.0)
        return method.make_merger({}, given), scale
    if options.density is not None and "density" not in method.options:
        raise InputError(
            f"merge.density={options.density}, but method '{method.name}' has no density"
        )
    common: dict[str, Any] = {"seed": options.seed}
    if options.density is not None:
        common["density"] = options.density
    return method.make_merger(common, options.options), options.scale


def _try_settings(config: RunConfig, method: Method) -> None:
    """Make once what the run will make for every task, so that wrong settings show at once."""
    check_loggers(config)
    with settings_named("stream"):
        check_loading(config.stream.batch_size, config.stream.num_workers, config.stream.cache)
    _try_beside(config, methods_beside(config.method, config.compare))
    try:
        L.Trainer(**config.trainer | {"logger": False, "enable_checkpointing": False})
    # Lightning raises errors of several kinds for its arguments.
    except Exception as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    merge_callback(config, method)
    if config.merge.scale == "auto" and not method.merger:
        raise InputError(f"merge.scale=auto, but method '{method.name}' merges nothing")
    if config.merge.scale == "auto" and not config.stream.held_out:
        raise InputError(
            f"stream.held_out={config.stream.held_out}, but merge.scale=auto needs images to "
            f"choose on; leave it out for {HELD_OUT}, or give a share above 0"
        )
    for regularizer in ("lwf", "ewc"):
        make_regularizer(config, regularizer)


def _try_beside(config: RunConfig, methods: list[Method]) -> None:
    # Methods with class statistics merge with the options of those without.
    own = find_method(config.method).plain
    merging = {m.plain.name: m.plain for m in methods if m.merger and m.plain != own}
    for name in config.merge.beside:
        if name not in merging:
            known = list(merging)
            raise unknown_name("method beside the run's own in merge.beside", str(name), known)
    for name, method in merging.items():
        try:
            make_merger(config, method)
        except InputError as error:
            raise InputError(f"merge.beside.{name}: {error}") from error
