"""Continual learning by model merging, for PyTorch Lightning."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_merge.benchmarks.finished import load
    from cl_merge.clip import CLIPClassifier
    from cl_merge.engine import merge_checkpoints
    from cl_merge.errors import InputError
    from cl_merge.fit import fit_stream
    from cl_merge.heads import ZeroShotHead, zero_shot_head
    from cl_merge.mergers import Merger, fold_method, get_merger, merge, merge_method
    from cl_merge.metrics import AccuracyMatrix
    from cl_merge.predicting import ImageClassifier
    from cl_merge.pretrained import Clip, load_clip
    from cl_merge.scenario import Task
    from cl_merge.stream import TaskStream
    from cl_merge.task_vector import TaskVector

__version__ = version("cl-merge")

# Imported when first asked for: Lightning and its company take seconds, task vectors do not need
# them.
_HOMES = {
    "AccuracyMatrix": "metrics",
    "CLIPClassifier": "clip",
    "Clip": "pretrained",
    "ImageClassifier": "predicting",
    "InputError": "errors",
    "Merger": "mergers",
    "Task": "scenario",
    "TaskStream": "stream",
    "TaskVector": "task_vector",
    "ZeroShotHead": "heads",
    "fit_stream": "fit",
    "fold_method": "mergers",
    "get_merger": "mergers",
    "load": "benchmarks.finished",
    "load_clip": "pretrained",
    "merge": "mergers",
    "merge_checkpoints": "engine",
    "merge_method": "mergers",
    "zero_shot_head": "heads",
}

__all__ = [
    "AccuracyMatrix",
    "CLIPClassifier",
    "Clip",
    "ImageClassifier",
    "InputError",
    "Merger",
    "Task",
    "TaskStream",
    "TaskVector",
    "ZeroShotHead",
    "fit_stream",
    "fold_method",
    "get_merger",
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
