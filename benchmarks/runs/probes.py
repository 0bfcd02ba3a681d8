"""Data sets beside a run's stream: what its models forget of what the pre-trained one knew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
from torch import nn

from cl_merge.benchmarks.datasets.loading import load_parts, probe_configs
from cl_merge.config.schema import RunConfig
from cl_merge.data.task_stream import TaskStream
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.zero_shot import ZeroShotHead


@dataclass(frozen=True)
class Probe:
    """The test images of a data set, and its own classes in its own prompts."""

    stream: TaskStream
    head: ZeroShotHead

    def accuracy(self, visual: nn.Module, trainer: L.Trainer) -> float:
        """Classify with an image encoder and the text head alone: per cent of all test images."""
        model = CLIPClassifier(visual, self.head)
        trainer.test(model, datamodule=self.stream, verbose=False)
        assert model.accuracy is not None  # noqa: S101 - made by the test
        (row,) = model.accuracy.rows.values()
        correct, _, total = row.sum(dim=1)
        return 100.0 * int(correct) / int(total)


def load_probes(config: RunConfig) -> Mapping[str, Probe]:
    """Load the data sets that a configuration probes, each by its recipe, for the run's model."""
    return {name: _load(own) for name, own in probe_configs(config).items()}


def _load(config: RunConfig) -> Probe:
    stream, model = load_parts(config)
    return Probe(stream, model.head)
