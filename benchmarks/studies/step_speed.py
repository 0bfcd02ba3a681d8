"""The speed and memory of training on one batch, with the framework and with a bare loop."""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from typing_extensions import override

from cl_merge.benchmarks.studies import harness
from cl_merge.callbacks import MergeCallback
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.training.cost import Meter

WAYS = ("framework", "bare")
MODES = ("32-true", "bf16-mixed", "bf16-mixed+compile")
WARMUP = 8  # steps before those that are timed

_FIGURES = (
    ("images_per_second", "images/s", ".1f"),
    ("cpu_ms", "CPU ms a step", ".2f"),
    ("memory_mib", "peak MiB", ".0f"),
)

Batch = tuple[Tensor, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be asked for."""
    parser.add_argument("--model", default="glyph", help="as in cl-merge run, or an architecture")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeat", type=int, default=3, help="processes for each")
    parser.add_argument("--only", help="measure one in this process, and print JSON")
    parser.add_argument("--json", type=Path, help="where to write all figures")


def run(arguments: argparse.Namespace, module: str) -> None:
    """Measure every mode, each way in processes of its own in turn, and print a table.

    Args:
        arguments: Those of the command line.
        module: The module whose command it is.
    """
    if arguments.only:
        mode, way = arguments.only.split("/")
        harness.tell(measure(mode, way, arguments.model, arguments.batch_size, arguments.steps))
        return
    found = {
        mode: harness.alternated(
            {way: partial(harness.alone, module, f"{mode}/{way}") for way in WAYS}, arguments.repeat
        )
        for mode in arguments.modes
    }
    if arguments.json:
        figures = {"arguments": sys.argv[1:], "modes": found}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    table = harness.new_table(
        f"{arguments.model}, batch {arguments.batch_size}, {arguments.steps} steps, "
        f"{arguments.repeat} pairs; median (range)",
        "", "framework", "bare loop", "framework, % of it",
    )  # fmt: skip
    for mode, ways in found.items():
        for key, name, digits in _FIGURES:
            ours, bare = ([figures[key] for figures in ways[way]] for way in WAYS)
            shares = [100 * a / b for a, b in zip(ours, bare, strict=True)]
            table.add_row(
                f"{mode}, {name}",
                *(f"{harness.Spread.of(column):{digits}}" for column in (ours, bare)),
                f"{harness.Spread.of(shares):.1f}",
            )
    harness.show(table)


def measure(
    mode: str, way: str, model: str, batch_size: int, steps: int, warmup: int = WARMUP
) -> dict[str, float]:
    """Train in this process, on a GPU where there is one.

    Returns:
        Images per second and milliseconds of the processor per step, over the timed steps; peak
        memory in MiB, of the device where there is one; and the loss of the last step.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, images, labels = harness.random_work(model, batch_size)
    module, batch = module.to(device), (images.to(device), labels.to(device))
    precision, compiled = mode.removesuffix("+compile"), mode.endswith("+compile")
    if compiled:
        module.visual.compile()
    train = _with_framework if way == "framework" else _bare
    meter = Meter()
    watch, loss = train(module, batch, precision, warmup, warmup + steps)
    cost = meter.read()
    memory = cost.peak_device_memory if device.type == "cuda" else cost.peak_memory
    return {
        "images_per_second": steps * batch_size / watch.wall,
        "cpu_ms": 1000 * watch.cpu / steps,
        "memory_mib": memory / 2**20,
        "loss": loss,
    }


class _Timed(Callback):
    """Times the steps after the first few, from the end of one to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.watch = harness.Stopwatch()
        self.loss = torch.zeros(())
        self._first, self._last = first, last

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self._first:
            self.watch.start()
        if batch_idx + 1 == self._last:
            self.watch.stop()
            self.loss = outputs["loss"].detach()


def _with_framework(
    module: CLIPClassifier, batch: Batch, precision: Any, warmup: int, steps: int
) -> tuple[harness.Stopwatch, float]:
    timed = _Timed(warmup, steps)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=batch[0].device.type,
        devices=1,
        precision=precision,
        callbacks=[MergeCallback("magmax"), timed],
        **harness.QUIET,
    )
    batches: Any = list(repeat(batch, steps))
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return timed.watch, timed.loss.item()


def _bare(
    module: CLIPClassifier, batch: Batch, precision: str, warmup: int, steps: int
) -> tuple[harness.Stopwatch, float]:
    images, labels = batch
    tower, head = module.visual, module.head.weight
    base = {name: weight.detach().clone() for name, weight in tower.named_parameters()}
    tower.train()
    optimizer = AdamW(tower.parameters(), lr=1e-5, weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    watch, loss = harness.Stopwatch(), torch.zeros(())
    for step in range(steps):
        if step == warmup:
            watch.start()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision != "32-true"):
            features = tower(images)
        loss = F.cross_entropy(F.linear(F.normalize(features.float(), dim=-1), head), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    watch.stop()
    with torch.no_grad():  # the task vector, as the framework makes one
        [weight - base[name] for name, weight in tower.named_parameters()]
    return watch, loss.item()
