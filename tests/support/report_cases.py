"""Made-up suites on disk for the tests of reports: what runs would have left, without running."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path

from results_files import write_results_file

from cl_merge.benchmarks.methods.method import find_method
from cl_merge.benchmarks.reports.figures.style import Drawing
from cl_merge.benchmarks.suites.definition import Setting, Suite
from cl_merge.benchmarks.suites.plan import FAILURE, jobs_of, make_plan

METHODS = ("zero-shot", "joint", "sequential", "magmax", "average", "ties")


def drawing(title, setting, svg="<svg></svg>", **more) -> Drawing:
    """A figure of a suite; nothing looks at its canvas."""
    words = {"caption": "what is drawn"}
    numbers = {"columns": ("task", "accuracy"), "rows": (("1", 91.25), ("2", None))}
    return Drawing(None, title, setting=setting, svg=svg, **{**words, **numbers, **more})


def suite_of(settings, methods=METHODS, seeds=(5, 6, 7), paper="table1", **more) -> Suite:
    more = {"name": "made-up", "about": "figures from a die"} | more
    return Suite(
        settings=tuple(Setting(data, tasks) for data, tasks in settings),
        methods=tuple(methods),
        shown=tuple(methods),
        seeds=tuple(seeds),
        paper=paper,
        **more,
    )


def fill(folder: Path, suite: Suite, failed: Collection[str] = (), missing: Collection[str] = ()):
    """Write what the runs of a suite would have left; some failed, some were never begun."""
    for job in jobs_of(make_plan(suite)):
        place = folder / job.path
        if job.path in missing:
            continue
        place.mkdir(parents=True)
        (place / "log.txt").write_text("cl-merge run\n")
        if job.path in failed:
            (place / FAILURE).write_text(json.dumps({"reason": "no space left <on> device"}))
            continue
        (place / "config.yaml").write_text(f"method: {job.methods[0]}\ncompare: true\n")
        methods = {"zero-shot", *job.methods}
        write_results_file(place, results(job, methods))
    return folder


def results(job, methods: Collection[str]) -> dict:
    tasks = job.setting.tasks or 3
    return {
        "method": job.methods[0],
        "seed": job.seed,
        "data": job.setting.data,
        "model": "ViT-B-16",
        "scenario": "class",
        "tasks": [
            {
                "name": f"name {i}",
                "classes": [2 * i, 2 * i + 1],
                "class_names": ["a", "b"],
                "train_images": 100,
                "held_out_images": 0,
                "test_images": 20,
            }
            for i in range(tasks)
        ],
        "methods": {name: method_results(name, job, tasks) for name in sorted(methods)},
        "training": {},
        "total": {"seconds": 90.0 + job.seed, "peak_memory": 2**31, "peak_device_memory": 0},
        "versions": {"python": "3.11.7", "cl-merge": "0.1.0", "torch": "2.11.0"},
        "machine": {"platform": "Linux", "threads": 2, "device": "cpu"},
    }


def method_results(name: str, job, tasks: int) -> dict:
    method = find_method(name)
    # Random, but the same each time, and about as good as in the paper.
    die = random.Random(f"{name} {job.path}")
    base = 60 + 3 * (sum(map(ord, name + job.setting.name)) % 8)

    def figure(middle: float) -> float:
        return middle + die.uniform(-1, 1)

    def matrix() -> list[list[float]]:
        steps = 1 if method.training == "joint" else tasks
        return [[die.uniform(0, 100) for _ in range(tasks)] for _ in range(steps)]

    whole = None if method.training == "joint" else 0.0
    return {
        "accuracy": figure(base),
        "metrics": {
            "accuracy": figure(base),
            "average_accuracy": figure(base - 1),
            "task_aware_accuracy": figure(90),
            "average_incremental_accuracy": whole if whole is None else figure(base + 8),
            "backward_transfer": whole if whole is None else figure(-5),
            "forgetting": whole if whole is None else figure(5),
            "forward_transfer": whole if whole is None else figure(-9),
        },
        "matrix": matrix(),
        "matrix_task_aware": matrix(),
        "seen": [base] * tasks,
        "training": method.training,
        "merger": method.merger,
        "scale": 0.5 if method.merger else None,
        **({"statistics": method.statistics} if method.statistics else {}),
    }
