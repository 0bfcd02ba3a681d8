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
from cl_merge.files import load_state

torch.set_num_threads(1)
# About as many flushes and renames as a run has.
WRITES = 120

SETTINGS = [
    "stream.tasks=2",
    "stream.images_per_class=4",
    "stream.test_fraction=0.05",
    "stream.batch_size=8",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "method=ewc-magmax",
    "compare=[lwf-magmax,ties]",
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


def state(folder: Path) -> str:
    """Where a run stood when it was killed."""
    if (folder / "results.json").exists():
        return "the end"
    states = sorted(folder.glob("state/*/state.ckpt"), key=lambda file: file.stat().st_mtime)
    if not states:
        return "nothing yet"
    trained = load_state(states[-1])["cl_merge"]["trained"]
    return "a task trained" if trained else "within a task"
