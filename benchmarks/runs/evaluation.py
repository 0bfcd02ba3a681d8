"""The evaluation of a run's methods from what its folder stores, whenever that was stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor

from cl_merge.benchmarks.methods.method import Method
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run, make_merger
from cl_merge.benchmarks.runs.run_log import RunLog
from cl_merge.callbacks import ClassStatistics
from cl_merge.callbacks.auto_scale import AutoScale
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.class_statistics import StreamStatistics
from cl_merge.errors import InputError
from cl_merge.mergers import Average, Merger
from cl_merge.storage.files import load_tensors
from cl_merge.task_vectors.module_weights import (
    copies,
    floating_buffers,
    install,
    trained_parameters,
)
from cl_merge.task_vectors.scales import Scales, scaled
from cl_merge.task_vectors.task_vector import TaskVector
from cl_merge.training.journal import is_first_process

# What of the trainer's arguments also holds for evaluations outside a fit.
_WHERE_IT_RUNS = {"accelerator", "devices", "num_nodes", "strategy", "precision"}
_WHERE_IT_RUNS |= {"deterministic", "limit_test_batches"}

_UNSCALED = Scales.read(1.0, 1.0)


class Evaluation:
    """The methods of a run that share a training, evaluated from what that training has stored.

    It does not matter when: after each task while the run trains, when a run that was stopped goes
    on, or months later for methods that join it. What the folder has already is not done again.
    Mergers and class statistics stay in memory from task to task.
    """

    def __init__(
        self, run: Run, methods: Sequence[Method], progress: RunProgress, log: RunLog
    ) -> None:
        self._run, self.progress, self.log = run, progress, log
        self.methods = methods
        self.training = methods[0].training
        self.stream = run.stream_of(self.training)
        self._tested = run.tested_tasks(self.training)
        self._mergers: dict[str, Merger] = {}
        self._statistics = {
            m.name: self._class_statistics(m, m.statistics) for m in methods if m.statistics
        }

    def after_task(self, task: int) -> None:
        """Evaluate every method after a task of the training's stream, which is stored."""
        for method in self.methods:
            self.evaluate(method, task)

    def evaluate(self, method: Method, task: int) -> None:
        """Evaluate a method after a task, as far as the folder does not say how good it is.

        Classifies with the base plus the scaled merge of the task vectors up to that task; with the
        base plus the task vector where nothing is merged, and with the base where nothing is
        trained. A scale that is to be chosen is chosen first, then class statistics learn the task.
        The tasks before it have been evaluated.
        """
        run, voting = self._run, self._statistics.get(method.name)
        self.stream.select(task)
        row, matrix = self.stream.row, run.matrices[method.name]
        choice = run.choice(method) if run.scale(method, task) is None else None
        learn = voting is not None and voting.tasks <= task
        test = task in self._tested and row not in matrix.rows
        probed = run.folder.probes(method.name)
        probes = [name for name in run.probes if row not in probed.get(name, {})]
        probes = probes if task in self._tested else []
        if not (choice or learn or test or probes):
            return
        where = f"task {task + 1}/{len(self.stream.tasks)}, " if self.training else ""
        self.progress.describe(f"{where}evaluating {method.name}")
        if choice:
            self._choose_scale(method, task, choice)
        kept = copies(self._live())  # those of the training, which goes on with them
        try:
            install(self._live(), self._weights(method, task))
            if voting is not None and learn:
                self._learn(method, voting)
            if test:
                run.model.accuracy = matrix
                callbacks = [voting] if voting is not None else []
                evaluation_trainer(run.config.trainer, [*callbacks, self.progress]).test(
                    run.model, datamodule=self.stream, verbose=False
                )
                self.log.evaluation(method, row)
                run.folder.add_row(method.name, row, matrix.rows[row])
            for name in probes:
                trainer = evaluation_trainer(run.config.trainer, [self.progress])
                found = run.probes[name].accuracy(run.model.visual, trainer)
                run.folder.add_probe(method.name, name, row, found)
        finally:
            install(self._live(), kept)  # looked up anew: to change devices makes new buffers

    def install(self, method: Method) -> None:
        """Put the weights that a method classifies with after the last task into the model."""
        install(self._live(), self._weights(method, len(self.stream.tasks) - 1))
        voting = self._statistics.get(method.name)
        if voting is not None and voting.kind == "aligned":
            voting.install(self._run.model)

    def _live(self) -> dict[str, Tensor]:
        return trained_parameters(self._run.model) | floating_buffers(self._run.model)

    def _weights(self, method: Method, task: int) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers that a method classifies with after a task."""
        run = self._run
        yield from run.buffers.items()
        scales = run.scale(method, task)
        if scales is not None:
            yield from scaled(run.base, self._merged(method, task).items(), scales)
            yield from self._beside_merged(task)
        elif self.training is not None and method.statistics is None:
            yield from scaled(
                run.base, TaskVector.load(self._stored("task", task)).items(), _UNSCALED
            )
            yield from self._unmerged(task).items()
        else:
            yield from run.base.items()

    def _merged(self, method: Method, task: int) -> Merger:
        """The merger of a method with the task vectors up to a task; methods may share it."""
        # At another scale the same is merged, unless it has options of its own.
        config, plain = self._run.config, method.plain
        name = plain.name if plain.name in config.merge.beside else method.merging
        if name not in self._mergers:
            self._mergers[name] = make_merger(config, plain)[0]
        merger = self._mergers[name]
        while merger.tasks <= task:
            following = merger.tasks
            vector, importance = TaskVector.load(self._stored("task", following)), None
            if merger.weighted:
                importance = self._placed(load_tensors(self._stored("importance", following))[0])
            merger.update(self._placed(vector), importance)
        return merger

    def _unmerged(self, task: int) -> dict[str, Tensor]:
        """What moved in a task and is not in its task vector; runs of before did not store it."""
        file = self._stored("unmerged", task)
        return load_tensors(file)[0] if file.exists() else {}

    def _stored(self, what: str, task: int) -> Path:
        return self._run.folder.task_vectors(str(self.training)) / f"{what}{task}.safetensors"

    def _beside_merged(self, task: int) -> Iterator[tuple[str, Tensor]]:
        """What a merged model holds that is not merged, if it is not the base's.

        Parameters that are left out hold what the task left, as with the callback; buffers what
        ``merge.buffers`` says.
        """
        run, choice, stored = self._run, self._run.config.merge.buffers, self._unmerged(task)
        for name, value in stored.items():
            if name not in run.buffers or choice in (None, "trained"):
                yield name, value
        if choice == "average":
            average = Average()
            for each in range(task + 1):
                then = self._unmerged(each)
                average.update({name: then.get(name, b) for name, b in run.buffers.items()})
            yield from average.items()

    def _choose_scale(self, method: Method, task: int, choice: AutoScale | DriftScale) -> None:
        run, stream = self._run, self.stream

        def choose(trainer: L.Trainer, module: L.LightningModule) -> None:
            changes = dict(self._merged(method, task).items())
            base, beside = self._placed(run.base), run.buffers | dict(self._beside_merged(task))

            def values(scales: Scales) -> Iterator[tuple[str, Tensor]]:
                return chain(scaled(base, changes.items(), scales), beside.items())

            if isinstance(choice, AutoScale):
                images = stream.held_out_dataloader()
            else:
                images = stream.sample_dataloader(choice.images)
            published = self._merged(method, task).published_scale
            found = choice.choose(
                trainer, module, images, list(changes), values, published, self._live()
            )
            run.folder.add_chosen_scale(method.plain.name, task, found.plain())

        self._within_trainer(choose)

    def _class_statistics(self, method: Method, kind: str) -> ClassStatistics:
        images = self.stream.task_dataloader
        options: dict[str, Any] = {} if method.rank is None else {"rank": method.rank}
        made = ClassStatistics(kind, text=method.text, images=images, **options)
        if method.merger is not None:  # otherwise the model holds the pre-trained weights
            made.base, made.base_buffers = self._run.base, self._run.buffers
        file = self._run.folder.statistics(method.name)
        if file.exists():
            made.statistics = StreamStatistics.load(file)
            chosen = self._run.folder.chosen_scales(method.plain.name)
            if self._run.choice(method) is not None and len(chosen) < made.statistics.tasks:
                raise InputError(
                    f"'{file}' was begun when method '{method.name}' had a fixed scale, which it "
                    "now chooses after each task; remove the file to learn its statistics anew"
                )
        return made

    def _learn(self, method: Method, statistics: ClassStatistics) -> None:
        self._within_trainer(statistics.learn)
        run, found = self._run, statistics.statistics
        if found is not None and is_first_process():
            metadata = {"method": method.name, "model": run.config.model}
            found.save(run.folder.statistics(method.name), metadata)

    def _within_trainer(self, work: Callable[[L.Trainer, L.LightningModule], object]) -> None:
        """Do something where a trainer has set up devices and processes."""

        def start(trainer: L.Trainer, module: L.LightningModule) -> None:
            self.stream.trainer = trainer  # how many processes share the images
            # What is kept outlives the inference mode of a prediction.
            with torch.inference_mode(False):
                work(trainer, module)

        trainer = evaluation_trainer(
            self._run.config.trainer, [LambdaCallback(on_predict_start=start)]
        )
        # An iterator tells no length: without a batch the hooks fire all the same.
        trainer.predict(self._run.model, iter(()), return_predictions=False)

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors where the run merges: on ``merge.device``, or where it trains."""
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    @cached_property
    def _device(self) -> torch.device:
        config = self._run.config
        if config.merge.device is not None:
            return torch.device(config.merge.device)
        return evaluation_trainer(config.trainer).strategy.root_device


def evaluation_trainer(
    settings: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> L.Trainer:
    """Make a trainer that only evaluates, where and how precisely the training's settings say."""
    return L.Trainer(
        **{key: value for key, value in settings.items() if key in _WHERE_IT_RUNS},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
