"""Format ``torch``: images to logits as a program of `torch.export`."""

from __future__ import annotations

from pathlib import Path

import torch

from cl_merge.benchmarks.export.comparing import check_same, probe
from cl_merge.benchmarks.export.network import Network
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored

FILE = "model.pt2"


def reason(run: FinishedRun) -> str | None:
    """Every model can be written."""
    return None


def write(restored: Restored, folder: Path) -> None:
    """Write the classifier as ``model.pt2``.

    Args:
        restored: The model of a finished run.
        folder: Where.

    Raises:
        InputError: If what was written gives other logits.
    """
    torch.export.save(traced(restored), folder / FILE)
    again = torch.export.load(folder / FILE).module()
    check_same("torch", again, restored)


def traced(restored: Restored) -> torch.export.ExportedProgram:
    """Write down what the classifier computes, for any number of images.

    Args:
        restored: The model of a finished run.

    Returns:
        The program, from images to logits.
    """
    images = probe(restored.clip.image_size)
    batch = {"images": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(Network(restored), (images,), dynamic_shapes=batch)
