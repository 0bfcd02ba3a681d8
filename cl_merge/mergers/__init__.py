"""Mergers: what makes one task vector of many, in memory that does not grow with their number."""

from cl_merge.mergers.base import Merger
from cl_merge.mergers.custom import fold_method, merge_method
from cl_merge.mergers.max_magnitude import MaxMagnitude
from cl_merge.mergers.random_mix import RandomMix
from cl_merge.mergers.registry import MERGERS, find_merger, get_merger, merge
from cl_merge.mergers.task_arithmetic import Average, TaskArithmetic
from cl_merge.mergers.ties import Ties

__all__ = [
    "MERGERS",
    "Average",
    "MaxMagnitude",
    "Merger",
    "RandomMix",
    "TaskArithmetic",
    "Ties",
    "find_merger",
    "fold_method",
    "get_merger",
    "merge",
    "merge_method",
]
