"""Format ``onnx``: images to logits as an ONNX graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_merge.benchmarks.export.comparing import check_same
from cl_merge.benchmarks.export.torch_program import traced
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored

FILE = "model.onnx"
# A file of ONNX's own format ends at 2 GB; larger weights lie beside it.
_ONE_FILE = 1_900_000_000


def reason(run: FinishedRun) -> str | None:
    """Every model can be written."""
    return None


def write(restored: Restored, folder: Path) -> None:
    """Write the classifier as ``model.onnx``: input ``images``, output ``logits``, any batch.

    Args:
        restored: The model of a finished run.
        folder: Where.

    Raises:
        InputError: If what was written gives other logits.
    """
    program = traced(restored)
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    beside = size > _ONE_FILE
    with _quiet():
        graph = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            external_data=beside,
            verbose=False,
        )
    assert graph is not None  # noqa: S101 - so with dynamo
    graph.save(folder / FILE, external_data=beside)
    check_same("onnx", _session(folder / FILE), restored)


def _session(file: Path) -> Callable[[Tensor], Tensor]:
    """Run a graph on the CPU."""
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        (found,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(found)

    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter tells its own developers from the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
