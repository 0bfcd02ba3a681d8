"""Checkpoints of any size: read a stretch at a time, written whole or not at all."""

from cl_merge.storage.reading import open_weights
from cl_merge.storage.weights import Weights
from cl_merge.storage.writing import Writer, check_output, write_weights

__all__ = ["Weights", "Writer", "check_output", "open_weights", "write_weights"]
