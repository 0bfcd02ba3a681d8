"""Folders of suites with made-up runs, for the tests of figures."""

from __future__ import annotations

from pathlib import Path

import torch
from results_files import write_results_file

from cl_merge.benchmarks.methods.method import METHODS
from cl_merge.task_vectors.task_vector import TaskVector

OF_TRAINING = {
    "sequential": ("sequential", "magmax", "average-sequential"),
    "independent": ("independent", "max-abs", "average"),
    "lwf": ("lwf", "lwf-magmax"),
    "joint": ("joint",),
}


def make_vectors(tasks: int, seed: int = 0, size: int = 40) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(seed)

    def vector() -> TaskVector:
        shapes = {
            "visual.conv1.weight": (size, 3),
            "visual.blocks.0.weight": (size, 5),
            "visual.blocks.10.bias": (size,),
            "visual.blocks.2.bias": (size,),
            "visual.proj": (7, 2),
        }
        return TaskVector({n: torch.randn(s, generator=generator) for n, s in shapes.items()})

    return [vector() for _ in range(tasks)]


def make_result(name: str, tasks: int, seed: int = 0) -> dict[str, object]:
    method = METHODS[name]
    generator = torch.Generator().manual_seed(1000 * seed + list(METHODS).index(name))
    rows = 1 if method.training == "joint" else tasks
    matrix = (100 * torch.rand(rows, tasks, generator=generator)).tolist()
    if name == "zero-shot":
        matrix = [matrix[0]] * tasks
    seen = [sum(row[: i + 1]) / (i + 1) for i, row in enumerate(matrix)]
    accuracy = sum(matrix[-1]) / tasks
    return {
        "accuracy": accuracy,
        "matrix": matrix,
        "matrix_task_aware": matrix,
        "seen": [None] * (tasks - 1) + [accuracy] if rows == 1 else seen,
        "training": method.training,
        "merger": method.merger,
        "scale": 0.5 if method.merger else None,
        **({"statistics": method.statistics} if method.statistics else {}),
    }


def make_run(
    suite: Path,
    setting: str,
    training: str,
    *,
    tasks: int = 3,
    seed: int = 0,
    vectors: list[TaskVector] | None = None,
) -> Path:
    """Write what a finished run leaves, as far as figures read it."""
    folder = suite / setting / f"seed{seed}" / training
    for index, vector in enumerate(make_vectors(tasks, seed) if vectors is None else vectors):
        vector.save(folder / "task_vectors" / training / f"task{index}.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    methods = ("zero-shot", *OF_TRAINING[training])
    results = {
        "tasks": [{"name": f"t{i}", "class_names": ["a"], "test_images": 10} for i in range(tasks)],
        "methods": {name: make_result(name, tasks, seed) for name in methods},
    }
    write_results_file(folder, results)
    (folder / "config.yaml").write_text(f"data: digits\nmethod: {methods[-1]}\nseed: {seed}\n")
    return folder


def make_suite(
    suite: Path,
    *,
    setting: str = "birds-3",
    tasks: int = 3,
    seeds: int = 2,
    trainings: tuple[str, ...] = ("sequential", "independent"),
) -> Path:
    for seed in range(seeds):
        for training in trainings:
            make_run(suite, setting, training, tasks=tasks, seed=seed)
    return suite
