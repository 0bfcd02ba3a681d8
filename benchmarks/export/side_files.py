"""What goes with every exported model: its classes, and how images are prepared for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from cl_merge.benchmarks.export.run_prompts import prompts_of
from cl_merge.benchmarks.runs.trained_run import Restored

CLASSES, PREPROCESSING = "classes.json", "preprocessing.json"


def write_beside(restored: Restored, folder: Path) -> list[dict[str, Any]]:
    """Write ``classes.json`` and ``preprocessing.json``.

    Args:
        restored: The model of a finished run.
        folder: Where.

    Returns:
        The classes: of each its ``name``, the ``tasks`` that it belongs to, from 0, and, if they
        are known, the ``prompts`` of its row of the text head.
    """
    prompts = prompts_of(restored)
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(restored.run.class_names):
        tasks = [
            number
            for number, task in enumerate(restored.run.results["tasks"])
            if label in task["classes"]
        ]
        classes.append({"name": name, "tasks": tasks})
        if prompts is not None:
            classes[-1]["prompts"] = prompts[label]
    _write(folder / CLASSES, classes)
    _write(folder / PREPROCESSING, preprocessing(restored))
    return classes


def preprocessing(restored: Restored) -> dict[str, Any]:
    """Say how an image becomes what the model takes.

    Args:
        restored: The model of a finished run.

    Returns:
        ``size`` (height and width), ``mean`` and ``std`` (of values from 0 to 1), ``interpolation``
        and ``resize_mode`` (``shortest``: the shorter side to the size, then the centre;
        ``squash``: both sides to it; ``longest``: the longer side to it, then ``fill_color``).
    """
    found = cast(Any, restored.model.visual).preprocess_cfg
    size = found["size"]
    return {
        "size": [size, size] if isinstance(size, int) else list(size),
        "mode": found["mode"],
        "mean": list(found["mean"]),
        "std": list(found["std"]),
        "interpolation": found["interpolation"],
        "resize_mode": found["resize_mode"],
        "fill_color": found["fill_color"],
    }


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
