"""A whole run from the command line, small, for `killing.py`."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from killing import digest

from cl_merge import cli
from cl_merge.benchmarks.datasets import digits
from cl_merge.models.pretrained import load_clip
from cl_merge.storage.files import load_state

torch.set_num_threads(1)
# Imported and made once, before any fork: what a run needs only on its way.
for module in (
    "cl_merge.benchmarks.reports.run_terminal",
    "cl_merge.benchmarks.runs.training",
    "matplotlib.backends.backend_agg",
):
    import_module(module)
if find_spec("tensorboard"):
    import_module("torch.utils.tensorboard")
load_clip("glyph")
digits.digits = cache(digits.digits)
digits.digits()

SETTINGS = [
    "stream.tasks=2",
    "stream.images_per_class=2",
    "stream.test_fraction=0.03",
    "stream.batch_size=4",
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
    for cost in ("training", "total", "finished"):
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
