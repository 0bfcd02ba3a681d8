"""Merging along a stream in plain torch: what the callbacks do, without a trainer."""

from cl_merge.stream_merger.stream_merger import StreamMerger

__all__ = ["StreamMerger"]
