"""A whole run from the command line, small, for `killing.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 - imported once, before any fork
import open_clip  # noqa: F401
import torch
from killing import digest

import cl_merge.benchmarks.training
import cl_merge.load  # noqa: F401
from cl_merge import cli

torch.set_num_threads(1)
# About as many flushes and renames as a run has.
WRITES = 120

SETTINGS = [
    "stream.tasks=2",
    "stream.images_per_class=6",
    "stream.test_fraction=0.05",
    "stream.batch_size=16",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "method=ewc-magmax",
    "compare=[lwf-magmax,ties,random-mix,joint]",
    "checkpoint_seconds=0",
]


def work(folder: Path) -> int:
    return cli.main(["run", *SETTINGS, f"out={folder}"])


def outcome(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "results.json").read_text())
    for cost in ("training", "total"):
        del found[cost]
    files = [*folder.rglob("*.safetensors"), *folder.glob("*.png")]
    return {
        "results": found,
        "files": {str(file.relative_to(folder)): digest(file) for file in sorted(files)},
        "rest": sorted(f.name for f in folder.iterdir()),
        "temporary": [file.name for file in folder.rglob("*.tmp")],
    }
