"""What plugs into a Lightning Trainer."""

from cl_merge.callbacks.auto_scale import AutoScale
from cl_merge.callbacks.class_statistics import ClassStatistics
from cl_merge.callbacks.drift_penalty import DriftPenalty
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.callbacks.ewc import EWC
from cl_merge.callbacks.ewc_penalty import EWCPenalty
from cl_merge.callbacks.lwf import LwF
from cl_merge.callbacks.merge import MergeCallback

__all__ = [
    "EWC",
    "AutoScale",
    "ClassStatistics",
    "DriftPenalty",
    "DriftScale",
    "EWCPenalty",
    "LwF",
    "MergeCallback",
]
