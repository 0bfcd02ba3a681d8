"""Merge checkpoints on disk, of any size, a piece at a time over all tasks."""

from cl_merge.merge_files.merging import Merged, merge_checkpoints

__all__ = ["Merged", "merge_checkpoints"]
