"""What a run has found, put together for ``results.json``."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import msgspec
import torch

from cl_merge.benchmarks.methods.method import Method
from cl_merge.benchmarks.runs.results import (
    CostResults,
    MethodResults,
    Results,
    TaskResults,
    as_json,
)
from cl_merge.benchmarks.runs.run import Run
from cl_merge.training.cost import Cost

PACKAGES = ("cl-merge", "torch", "lightning", "open_clip_torch", "torchmetrics", "datasets", "timm")


def collect_results(run: Run) -> dict[str, Any]:
    """Put together what a run found whose stream is done, as it is read from ``results.json``."""
    # Of a run that had finished and was given more methods.
    former = run.folder.results().get("methods", {})
    found = Results(
        method=run.own.name,
        seed=run.config.seed,
        data=run.config.data,
        model=run.config.model,
        scenario=run.config.stream.scenario,
        tasks=[
            TaskResults(
                name=task.name,
                classes=list(task.classes),
                class_names=list(task.class_names),
                train_images=len(task.train),
                held_out_images=len(task.held_out),
                test_images=len(task.test),
            )
            for task in run.stream.tasks
        ],
        methods={
            method.name: msgspec.convert(former[method.name], MethodResults)
            if method.name in former
            else _method_results(run, method)
            for method in run.methods
        },
        training={name: [_cost(cost) for cost in costs] for name, costs in run.costs.items()},
        total=_cost(run.cost),
        finished=datetime.now(UTC).isoformat(timespec="minutes"),
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        machine={
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    )
    return as_json(found)  # type: ignore[no-any-return]


def _method_results(run: Run, method: Method) -> MethodResults:
    matrix = run.matrices[method.name]
    metrics, seen = matrix.metrics(run.matrices["zero-shot"]), matrix.seen()
    scale = run.scale(method)
    chosen = run.folder.chosen_scales(method.plain.name) if run.chooses_scale(method) else {}
    return MethodResults(
        accuracy=metrics["accuracy"],
        metrics=dict(metrics),
        matrix=matrix.accuracy().tolist(),
        matrix_task_aware=matrix.accuracy(aware=True).tolist(),
        # Joint training, and with evaluate=last every other, is evaluated after all tasks only.
        seen=[None] * (len(run.stream.tasks) - len(seen)) + seen,
        training=method.training,
        merger=method.merger,
        scale=scale.plain() if scale else None,
        statistics=method.statistics,
        chosen_scales=[chosen[task] for task in sorted(chosen)] or None,
    )


def _cost(cost: Cost) -> CostResults:
    return CostResults(**asdict(cost))
