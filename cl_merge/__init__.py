"""Continual learning by model merging, for PyTorch Lightning."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_merge.benchmarks.runs.trained_run import load
    from cl_merge.callbacks import (
        EWC,
        AutoScale,
        ClassStatistics,
        DriftPenalty,
        DriftScale,
        EWCPenalty,
        LwF,
        MergeCallback,
    )
    from cl_merge.data.task_stream import TaskStream
    from cl_merge.data.tasks import Task
    from cl_merge.errors import InputError
    from cl_merge.merge_files import merge_checkpoints
    from cl_merge.mergers import Merger, fold_method, get_merger, merge, merge_method
    from cl_merge.mergers.grams import gram_matrices
    from cl_merge.models.classifier import CLIPClassifier
    from cl_merge.models.predictor import ImageClassifier
    from cl_merge.models.pretrained import Clip, load_clip
    from cl_merge.models.zero_shot import ZeroShotHead, zero_shot_head
    from cl_merge.stream_merger import StreamMerger
    from cl_merge.task_vectors.scales import lines_scales
    from cl_merge.task_vectors.task_vector import TaskVector
    from cl_merge.training.fit import fit_stream
    from cl_merge.training.metrics import AccuracyMatrix

__version__ = version("cl-merge")

# Imported when first asked for: Lightning and its company take seconds, task vectors do not need
# them.
_HOMES = {
    "EWC": "callbacks",
    "AccuracyMatrix": "training.metrics",
    "AutoScale": "callbacks",
    "CLIPClassifier": "models.classifier",
    "ClassStatistics": "callbacks",
    "Clip": "models.pretrained",
    "DriftPenalty": "callbacks",
    "DriftScale": "callbacks",
    "EWCPenalty": "callbacks",
    "ImageClassifier": "models.predictor",
    "InputError": "errors",
    "LwF": "callbacks",
    "MergeCallback": "callbacks",
    "StreamMerger": "stream_merger",
    "Merger": "mergers",
    "Task": "data.tasks",
    "TaskStream": "data.task_stream",
    "TaskVector": "task_vectors.task_vector",
    "ZeroShotHead": "models.zero_shot",
    "fit_stream": "training.fit",
    "fold_method": "mergers",
    "get_merger": "mergers",
    "gram_matrices": "mergers.grams",
    "lines_scales": "task_vectors.scales",
    "load": "benchmarks.runs.trained_run",
    "load_clip": "models.pretrained",
    "merge": "mergers",
    "merge_checkpoints": "merge_files",
    "merge_method": "mergers",
    "zero_shot_head": "models.zero_shot",
}

__all__ = [
    "EWC",
    "AccuracyMatrix",
    "AutoScale",
    "CLIPClassifier",
    "ClassStatistics",
    "Clip",
    "DriftPenalty",
    "DriftScale",
    "EWCPenalty",
    "ImageClassifier",
    "InputError",
    "LwF",
    "MergeCallback",
    "Merger",
    "StreamMerger",
    "Task",
    "TaskStream",
    "TaskVector",
    "ZeroShotHead",
    "fit_stream",
    "fold_method",
    "get_merger",
    "gram_matrices",
    "lines_scales",
    "load",
    "load_clip",
    "merge",
    "merge_checkpoints",
    "merge_method",
    "zero_shot_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cl_merge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cl_merge.{_HOMES[name]}"), name)
