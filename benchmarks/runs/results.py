"""What a finished run found, as the content of ``results.json``."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from cl_merge.benchmarks.methods.method import Method
from cl_merge.benchmarks.runs.json_files import plain
from cl_merge.benchmarks.runs.run import Run
from cl_merge.training.metrics import AccuracyMatrix

PACKAGES = ("cl-merge", "torch", "lightning", "open_clip_torch", "torchmetrics", "datasets", "timm")


def results(run: Run) -> dict[str, Any]:
    """Put together what a run found.

    Args:
        run: A run whose stream is done.

    Returns:
        The content of ``results.json``, as it is read from there.
    """
    content: dict[str, Any] = plain(_found(run))
    return content


def _found(run: Run) -> dict[str, Any]:
    zero_shot = run.matrices["zero-shot"]
    # Of a run that had finished and was given more methods.
    former = run.folder.results().get("methods", {})
    return {
        "method": run.own.name,
        "seed": run.config.seed,
        "data": run.config.data,
        "model": run.config.model,
        "scenario": run.config.stream.scenario,
        "tasks": [
            {
                "name": task.name,
                "classes": list(task.classes),
                "class_names": list(task.class_names),
                "train_images": len(task.train),
                "held_out_images": len(task.held_out),
                "test_images": len(task.test),
            }
            for task in run.stream.tasks
        ],
        "methods": {
            method.name: former.get(method.name) or _method_results(run, method, zero_shot)
            for method in run.methods
        },
        "training": {name: [asdict(cost) for cost in found] for name, found in run.costs.items()},
        "total": asdict(run.cost),
        "finished": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def _method_results(run: Run, method: Method, zero_shot: AccuracyMatrix) -> dict[str, Any]:
    matrix = run.matrices[method.name]
    figures, seen = matrix.figures(zero_shot), matrix.seen()
    scales = run.scales.get(method.name)
    found = {
        "accuracy": figures["accuracy"],
        "metrics": figures,
        "matrix": matrix.accuracy().tolist(),
        "matrix_task_aware": matrix.accuracy(aware=True).tolist(),
        # Joint training, and with evaluate=last every other, is evaluated after all tasks only.
        "seen": [None] * (len(run.stream.tasks) - len(seen)) + seen,
        "training": method.training,
        "merger": method.merger,
        "scale": scales.plain() if scales else None,
    }
    if method.statistics is not None:
        found["statistics"] = method.statistics
    if method.plain.name in run.chosen:
        found["chosen_scales"] = [scales.plain() for scales in run.chosen[method.plain.name]]
    return found
