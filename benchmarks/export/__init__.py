"""A finished run as a folder that other programs load: open_clip, transformers, torch, ONNX."""

from cl_merge.benchmarks.export.exporting import FORMATS, export

__all__ = ["FORMATS", "export"]
