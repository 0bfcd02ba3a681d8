"""One run: what was asked for, what it works on, and what it has found so far."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import msgspec
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import load_parts, task_epochs
from cl_merge.benchmarks.formatting import data_label
from cl_merge.benchmarks.methods.method import TRAININGS, Method, compared_methods, find_method
from cl_merge.benchmarks.runs.loggers import check_loggers
from cl_merge.benchmarks.runs.probes import Probe, load_probes
from cl_merge.benchmarks.runs.progress import TRAIN_COST
from cl_merge.benchmarks.runs.provenance import command_of, machine, source_commit
from cl_merge.benchmarks.runs.results import Results
from cl_merge.benchmarks.runs.run_folder import RunFolder
from cl_merge.callbacks import EWC, DriftPenalty, LwF, MergeCallback
from cl_merge.callbacks.auto_scale import AutoScale
from cl_merge.callbacks.chosen_scale import as_choice
from cl_merge.callbacks.drift_scale import DriftScale
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

log = logging.getLogger(__name__)

PACKAGES = ("cl-merge", "torch", "lightning", "open_clip_torch", "torchmetrics", "datasets", "timm")


@dataclass
class Run:
    """A run in progress, and what it has found."""

    config: RunConfig
    folder: RunFolder  # where it writes, and finds what it did before it was stopped
    stream: TaskStream
    model: CLIPClassifier  # with the weights of the moment
    base: dict[str, Tensor]  # the pre-trained weights of the parameters that train
    buffers: dict[str, Tensor]  # the floating-point buffers of the pre-trained model
    probes: Mapping[str, Probe] = field(default_factory=dict)  # by the names of their data sets
    costs: dict[str, list[Cost]] = field(default_factory=dict)  # of tasks, by training
    cost: Cost = field(default_factory=Cost)  # of the run so far

    @cached_property
    def own(self) -> Method:
        """The method that the run is about."""
        return find_method(self.config.method)

    @cached_property
    def methods(self) -> list[Method]:
        """The methods of this run, in the order of the tables."""
        return compared_methods(self.config.method, self.config.compare)

    @cached_property
    def matrices(self) -> dict[str, AccuracyMatrix]:
        """The accuracy matrix of every method, with the rows that the folder has already."""
        classes = [task.classes for task in self.stream.tasks]
        found = {
            m.name: AccuracyMatrix(classes, len(self.stream.class_names)) for m in self.methods
        }
        for name, matrix in found.items():
            matrix.rows |= self.folder.rows(name)
        return found

    @property
    def trainings(self) -> dict[str, list[Method]]:
        """The trainings of this run, each with the methods that share it."""
        found = {name: [m for m in self.methods if m.training == name] for name in TRAININGS}
        return {name: methods for name, methods in found.items() if methods}

    def stream_of(self, training: str | None) -> TaskStream:
        """The tasks of a training: all in one where it is joint."""
        joint = training is not None and TRAININGS[training].joint
        return self.stream.joint() if joint else self.stream

    def tested_tasks(self, training: str | None) -> list[int]:
        """After which tasks of a training's stream its methods are tested; None trains nothing."""
        if training is None:
            return [0]
        tasks = range(len(self.stream_of(training).tasks))
        return list(tasks if self.config.evaluate == "every" else tasks[-1:])

    def choice(self, method: Method) -> AutoScale | DriftScale | None:
        """What chooses a method's scale after each task; None if it is given, or nothing merges."""
        former = self.folder.results().get("methods", {}).get(method.name)
        # Of a run that finished before the method chose its scale.
        fixed = former is not None and not former.get("chosen_scales")
        if not method.merger or fixed:
            return None
        return as_choice(make_merger(self.config, method)[1], self.config.merge.groups)

    def scale(self, method: Method, task: int = -1) -> Scales | None:
        """The scale of a method after a task; None if it merges nothing or has not chosen yet."""
        if not method.merger:
            return None
        if self.choice(method) is None:
            merger, scale = make_merger(self.config, method)
            if scale == "drift":  # it had finished
                scale = self.folder.results()["methods"][method.name]["scale"]
            return Scales.read(scale, merger.published_scale)
        chosen = self.folder.chosen_scales(method.plain.name)
        task = max(chosen, default=0) if task == -1 else task
        return Scales.read(chosen[task], 0.0) if task in chosen else None


def start_run(config: RunConfig) -> Run:
    """Check a configuration, load what it names and claim its folder; trains nothing yet.

    The folder is held until ``run.folder.release()``.
    """
    method = find_method(config.method)
    merge = _try_settings(config, method)
    probes = load_probes(config)  # before the generators are seeded for the run
    stream, model = load_parts(config)
    merge.check_names(trained_parameters(model))
    name = f"{data_label(config.data)}-{method.name.replace('/', '-')}"
    folder = RunFolder.claim(config, name)
    base, buffers = copies(trained_parameters(model)), copies(floating_buffers(model))
    return Run(config, folder, stream, model, base, buffers, probes)


def collect_results(run: Run) -> dict[str, Any]:
    """Put together what a run found whose stream is done, as it is read from ``results.json``."""
    # Of a run that had finished and was given more methods.
    former = run.folder.results().get("methods", {})
    found = {
        "method": run.own.name,
        "seed": run.config.seed,
        "data": run.config.data,
        "model": run.config.model,
        "scenario": run.config.stream.scenario,
        "tasks": [
            {
                "name": task.name,
                "classes": task.classes,
                "class_names": task.class_names,
                "train_images": len(task.train),
                "held_out_images": len(task.held_out),
                "test_images": len(task.test),
            }
            for task in run.stream.tasks
        ],
        "methods": {m.name: former.get(m.name) or _method_results(run, m) for m in run.methods},
        "training": run.costs,
        "total": run.cost,
        "finished": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": command_of(run.config),
        "commit": source_commit(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "machine": machine(),
    }
    results = msgspec.json.decode(msgspec.json.encode(found), type=Results)
    return msgspec.to_builtins(results)  # type: ignore[no-any-return]


def count_batches(run: Run) -> int:
    """Count the batches that a run has still to do, a training batch as several of evaluation.

    An estimate where the trainer may stop early, or a run was stopped in the middle of a task.
    """

    def batches(images: int) -> int:
        return -(-images // run.stream.batch_size)

    test = batches(sum(len(task.test) for task in run.stream.tasks))
    total = 0 if run.folder.rows("zero-shot") else test
    for name, methods in run.trainings.items():
        tasks = run.stream_of(name).tasks
        epochs = [run.config.trainer.get("max_epochs")]
        if not TRAININGS[name].joint:
            epochs = task_epochs(run.config, len(tasks))
        for task in set(range(len(tasks))) - set(run.folder.finished_tasks(name, len(tasks))):
            total += TRAIN_COST * batches(len(tasks[task].train)) * (epochs[task] or 1)
        rows = len(run.tested_tasks(name))
        total += test * sum(rows - len(run.folder.rows(method.name)) for method in methods)
    return total


def make_regularizer(config: RunConfig, name: str) -> Regularizer:
    """Make the callback that a training is regularized with, by its group of settings."""
    with settings_named(name):
        if name == "lwf":
            return LwF(**asdict(config.lwf))
        if name == "ewc":
            return EWC(**asdict(config.ewc), seed=config.seed)
        return DriftPenalty(**asdict(config.drift_penalty), seed=config.seed)


def make_merger(config: RunConfig, method: Method) -> tuple[Merger, Any]:
    """Make a method's merger, and say which scale is asked for, None for the published one.

    The options of ``merge`` are for what merges as the run's own method does, those of
    ``merge.beside`` for the others. A scale is for the method alone, with and without statistics.
    """
    options, own = config.merge, find_method(config.method)
    beside = options.beside.get(method.plain.name)
    if method.merging != own.merging or beside is not None:
        given = dict(beside if beside is not None else options.beside.get(method.merging) or {})
        scale = given.pop("scale", None)
        if beside is None:
            scale = None
        elif scale != "drift":
            Scales.read(scale, 1.0)
    else:
        given = dict(options.options)
        scale = options.scale if method.plain == own.plain else None
        if "seed" in method.options:
            given.setdefault("seed", options.seed)
        if options.density is not None:
            if "density" not in method.options:
                raise InputError(
                    f"merge.density={options.density}, but method '{method.name}' has no density"
                )
            given.setdefault("density", options.density)
    scale = method.plain.scale if scale is None else scale
    return get_merger(str(method.merger), **given), scale


def _try_settings(config: RunConfig, method: Method) -> MergeCallback:
    """Make once what the run will make for every task, so that wrong settings show at once."""
    check_loggers(config)
    if config.model == RunConfig.model and not find_data(config.data).recipe:
        log.warning(
            "'%s' has no recipe, and %s, the default model, knows characters only; choose model=, "
            "and the optimizer.lr= and optimizer.warmup_steps= that go with it",
            config.data,
            config.model,
        )
    with settings_named("stream"):
        check_loading(config.stream.batch_size, config.stream.num_workers, config.stream.cache)
    _try_compared(config, compared_methods(config.method, config.compare))
    _try_trainer(config)
    merge = _try_merge(config, method)
    for training in TRAININGS.values():
        if training.regularizer is not None:
            make_regularizer(config, training.regularizer)
    return merge


def _try_compared(config: RunConfig, methods: list[Method]) -> None:
    # Methods with class statistics merge with the options of those without, and those at a lowered
    # scale with the options of those at the published one.
    own = find_method(config.method).plain
    merging = {m.plain.name: m.plain for m in methods if m.merger and m.plain != own}
    for name in config.merge.beside:
        if name not in merging:
            kind = "method beside the run's own in merge.beside"
            raise unknown_name(kind, str(name), list(merging))
    for name, method in merging.items():
        if method.merging == own.merging and name not in config.merge.beside:
            continue  # with the options of the own method
        try:
            make_merger(config, method)
        except InputError as error:
            raise InputError(f"merge.beside.{name}: {error}") from error
    for method in methods:
        if not (config.out and method.weighted):
            continue
        stored = Path(config.out).expanduser() / "task_vectors" / str(method.training)
        for file in sorted(stored.glob("task*.safetensors")):
            importance = file.with_name(file.name.replace("task", "importance", 1))
            if not importance.exists():
                raise InputError(
                    f"'{importance}' is missing: method '{method.name}' weighs elements by what a "
                    "training estimates if one of the run's methods needs it from the first; begin "
                    "a new run with that method"
                )


def _try_trainer(config: RunConfig) -> None:
    devices, most = config.trainer.get("devices"), max(usable_cores(), 2)
    on_cpu = config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    # Memory would go first.
    if on_cpu and type(devices) is int and devices > most:
        raise InputError(
            f"trainer.devices={devices}; expected at most {most}: without a GPU each is a process "
            "with a model of its own, and more than there are cores gain nothing"
        )
    try:
        trainer = L.Trainer(**config.trainer | {"logger": False, "enable_checkpointing": False})
    # Lightning raises errors of several kinds for its arguments.
    except Exception as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    shards = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    strategy = trainer.strategy
    if isinstance(strategy, shards) or isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            f"trainer.strategy={config.trainer.get('strategy')}; expected auto or ddp: a run needs "
            "whole parameters in every process, and processes that live as long as it does"
        )
    _check_processes(trainer)


def _check_processes(trainer: L.Trainer) -> None:
    """Make sure that every device has a process, where a scheduler starts them."""
    devices, nodes = trainer.num_devices, trainer.num_nodes
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    started = cluster.world_size() if cluster and cluster.creates_processes_externally else None
    # Lightning would share out the batches, and leave out those of the missing processes.
    if started not in (None, devices * nodes):
        raise InputError(
            f"trainer.devices={devices} and trainer.num_nodes={nodes} need {devices * nodes} "
            f"processes, but SLURM or torchrun has started {started}; start as many, or with "
            "SLURM_JOB_NAME=interactive in the environment one that starts the others itself"
        )


def _try_merge(config: RunConfig, method: Method) -> MergeCallback:
    """Make the callback that would do the same in one fit, which checks the options."""
    options = config.merge
    merger, scale = make_merger(config, method) if method.merger else ("magmax", None)
    if options.scale == "auto" and not method.merger:
        raise InputError(f"merge.scale=auto, but method '{method.name}' merges nothing")
    if options.scale == "auto" and not config.stream.held_out:
        raise InputError(
            f"stream.held_out={config.stream.held_out}, but merge.scale=auto needs images to "
            f"choose on; leave it out for {HELD_OUT}, or give a share above 0"
        )
    with settings_named("merge"):
        return MergeCallback(
            merger,
            scale=as_choice(scale, options.groups) or scale,
            buffers=options.buffers,
            include=options.include,
            exclude=options.exclude,
            store=options.store,
            device=options.device,
            importance_samples=options.importance_samples,
        )


def _method_results(run: Run, method: Method) -> dict[str, Any]:
    matrix, probes = run.matrices[method.name], run.folder.probes(method.name)
    metrics, seen = matrix.metrics(run.matrices["zero-shot"]), matrix.seen()
    if probes:
        metrics["probe_accuracy"] = mean(rows[max(rows)] for rows in probes.values())
    scale = run.scale(method)
    chosen = run.folder.chosen_scales(method.plain.name) if run.choice(method) else {}
    return {
        "accuracy": metrics["accuracy"],
        "metrics": metrics,
        "matrix": matrix.accuracy().tolist(),
        "matrix_task_aware": matrix.accuracy(aware=True).tolist(),
        # Joint training, and with evaluate=last every other, is evaluated after all tasks only.
        "seen": [None] * (len(run.stream.tasks) - len(seen)) + seen,
        "training": method.training,
        "merger": method.merger,
        "scale": scale.plain() if scale else None,
        "statistics": method.statistics,
        "probes": {name: [rows[row] for row in sorted(rows)] for name, rows in probes.items()},
        "chosen_scales": [chosen[task] for task in sorted(chosen)] or None,
    }
