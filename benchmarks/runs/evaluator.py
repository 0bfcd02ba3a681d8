"""The model and images of a finished run, to evaluate what it has left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.runs.evaluation import evaluation_trainer
from cl_merge.config.reading import read_config
from cl_merge.config.schema import RunConfig
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError, listing
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.task_vectors.module_weights import copies, swapped, trained_parameters
from cl_merge.task_vectors.scales import Scales, scaled
from cl_merge.training.metrics import AccuracyMatrix


@dataclass(frozen=True)
class RunEvaluator:
    """The model and the test images of a finished run, to evaluate other weights on."""

    config: RunConfig
    stream: TaskStream
    model: CLIPClassifier  # with the pre-trained weights
    base: dict[str, Tensor]  # those weights, by parameter name

    @classmethod
    def of(cls, folder: str | Path) -> RunEvaluator:
        """Load what the run in a folder was made with."""
        config = read_config([], {}, Path(folder) / "config.yaml")
        stream, model = load_parts(config)
        return cls(config, stream, model, copies(trained_parameters(model)))

    def check_same(self, results: dict[str, Any]) -> None:
        """Make sure that the images are those that a run was tested on, by its results."""
        then = [(task["class_names"], task["test_images"]) for task in results["tasks"]]
        now = [(list(task.class_names), len(task.test)) for task in self.stream.tasks]
        if len(then) != len(now):
            raise InputError(f"the run had {len(then)} tasks, but its settings make {len(now)} now")
        pairs = zip(then, now, strict=True)
        differing = [str(task) for task, (one, other) in enumerate(pairs) if one != other]
        if differing:
            raise InputError(
                "the data set is not the one that the run was tested on: other classes or another "
                f"number of test images in tasks {listing(differing)}"
            )

    def counts(
        self, changes: Iterable[tuple[str, Tensor]], scale: float, task: int | None = None
    ) -> Tensor:
        """Evaluate the pre-trained weights plus a scaled change, on the images of a task or of all.

        Returns:
            By task the images classified correctly among all classes and among the task's own, and
            their number: int64 [3, T].
        """
        classes = [other.classes for other in self.stream.tasks]
        self.model.accuracy = matrix = AccuracyMatrix(classes, len(self.stream.class_names))
        weights = scaled(self.base, changes, Scales.read(scale, scale))
        with swapped(trained_parameters(self.model), weights):
            self._trainer.test(self.model, self._loader(task), verbose=False)
        (row,) = matrix.rows.values()
        return row

    def accuracy(self, changes: Iterable[tuple[str, Tensor]], scale: float) -> float:
        """The accuracy on all test images among all classes in per cent, micro average."""
        correct, _, total = self.counts(changes, scale).sum(dim=1)
        return 100.0 * int(correct) / int(total)

    def _loader(self, task: int | None) -> DataLoader[Any]:
        every = self.stream.test_dataloader()
        if task is None:
            return every
        # The test loader shows the rows of all tasks in ascending order.
        rows = np.unique(np.concatenate([other.test for other in self.stream.tasks]))
        chosen = np.searchsorted(rows, np.sort(self.stream.tasks[task].test))
        images, size = Subset(every.dataset, chosen.tolist()), self.stream.batch_size
        return DataLoader(images, batch_size=size, num_workers=every.num_workers)

    @cached_property
    def _trainer(self) -> L.Trainer:
        given = {k: v for k, v in self.config.trainer.items() if k in ("accelerator", "precision")}
        try:
            return evaluation_trainer({**given, "devices": 1})
        # Lightning raises errors of several kinds, such as for a GPU that this machine lacks.
        except Exception as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from error
