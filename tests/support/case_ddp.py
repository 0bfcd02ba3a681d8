"""Streams on one process or two, for `test_ddp.py`, which says what must be equal.

Run as ``torchrun case_ddp.py FOLDER SETTINGS...``; each process then also does its part of a run
with these settings, as ``cl-merge run`` does.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from tiny import QUIET, classifier, stream
from torchvision.transforms import ColorJitter, Compose, ToTensor

from cl_merge import cli, fit_stream
from cl_merge.callbacks import EWC, ClassStatistics, DriftPenalty, LwF, MergeCallback


def train(folder: Path, devices: int) -> None:
    """Train streams in several ways; leave counts of hits as JSON, and all tensors, by rank."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    where = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    trainer = QUIET | where | {"max_epochs": 2, "gradient_clip_val": 1.0}

    def run(name, *callbacks, behind=()):
        model, merge = classifier(), MergeCallback("random-mix", seed=3, directory=folder / name)
        result = fit_stream(
            model,
            data(devices, odd=bool(behind)),
            callbacks=[*callbacks, merge, *behind],
            trainer=trainer,
            seed=0,
        )
        tensors = {f"trained.{k}": v.detach() for k, v in model.named_parameters()}
        tensors |= {f"merged.{k}": v for k, v in merge.merged().items()}
        for callback in callbacks:
            for k, v in getattr(callback, "fisher", {}).items():
                tensors[f"fisher.{k}"] = v
            if isinstance(callback, DriftPenalty):
                for k, v in callback.penalty.gradients.items():
                    tensors[f"moments.{k}"] = v
        for callback in behind:
            for k, v in callback.statistics.state_dict().items():
                tensors[f"statistics.{k}"] = v
        save_file(tensors, folder / f"{name}-{devices}-{rank}.safetensors")
        return [result.accuracy.rows[i].tolist() for i in range(3)]

    model = classifier()
    L.Trainer(**QUIET, **where).test(model, datamodule=data(devices), verbose=False)
    found = {
        "before": model.accuracy.rows[0].tolist(),
        "plain": run("plain"),
        "lwf": run("lwf", LwF(3.0)),
        "published": run("published", EWC("published", weight=100.0)),
        "empirical": run("empirical", EWC("empirical", weight=30.0)),
        "drift": run("drift", DriftPenalty(weight=30.0, samples=None)),
        "both": run("both", LwF(), EWC("empirical", weight=30.0)),
        "voting": run("voting", behind=[ClassStatistics()]),
    }
    (folder / f"{devices}-{rank}.json").write_text(json.dumps(found))


def data(devices, odd=False):
    augment = Compose([ColorJitter(brightness=0.5), ToTensor()])
    found = stream(tasks=3, batch_size=8 // devices, train_transform=augment, seed=5)
    # An odd number of test images, so that a padded sampler would count one of them twice.
    found.tasks[2] = replace(found.tasks[2], test=found.tasks[2].test[:-1])
    if odd:
        found.tasks[1] = replace(found.tasks[1], train=found.tasks[1].train[:-1])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), devices=2)
    sys.exit(cli.main(["run", *sys.argv[2:]]))
