"""The speed and memory of training on one batch, with the framework and with a bare loop."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from cl_merge.benchmarks.studies.random_work import random_work
from cl_merge.benchmarks.studies.timing import Spread, Stopwatch, alone, alternated, new_table
from cl_merge.callbacks import MergeCallback
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.training.cost import measured

WAYS = ("framework", "bare")
MODES = ("32-true", "bf16-mixed", "bf16-mixed+compile")

_FIGURES = (
    ("images_per_second", "images/s", ".1f"),
    ("cpu_ms", "CPU ms a step", ".2f"),
    ("memory_mib", "peak MiB", ".0f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be asked for.

    Args:
        parser: Takes the arguments.
    """
    parser.add_argument(
        "--model", default="glyph", help="as in cl-merge run, or ARCH with random weights"
    )
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeat", type=int, default=3, help="processes for each")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
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
        sys.stdout.write(json.dumps(measure(mode, way, arguments)) + "\n")
        return
    found = {
        mode: alternated(
            {way: partial(alone, module, f"{mode}/{way}") for way in WAYS}, arguments.repeat
        )
        for mode in arguments.modes
    }
    if arguments.json:
        figures = {"arguments": sys.argv[1:], "modes": found}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    table = new_table(
        f"{arguments.model}, batch {arguments.batch_size}, {arguments.steps} steps, "
        f"{arguments.repeat} pairs; median (range)",
        "", "framework", "bare loop", "framework, % of it",
    )  # fmt: skip
    for mode, ways in found.items():
        for key, name, digits in _FIGURES:
            columns = {way: [figures[key] for figures in ways[way]] for way in WAYS}
            shares = [100 * a / b for a, b in zip(*columns.values(), strict=True)]
            spreads = (Spread.of(column) for column in columns.values())
            table.add_row(
                f"{mode}, {name}",
                *(f"{spread:{digits}}" for spread in spreads),
                f"{Spread.of(shares):.1f}",
            )
    Console(highlight=False).print(table)


def measure(mode: str, way: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train in this process.

    Args:
        mode: One of `MODES`.
        way: One of `WAYS`.
        arguments: Those of the command line.

    Returns:
        Images per second and milliseconds of the processor per step, over the timed steps; peak
        memory in MiB, of the device where there is one; and the loss of the last step.
    """
    torch.manual_seed(0)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    module, images, labels = random_work(
        arguments.model, arguments.batch_size, arguments.image_size
    )
    module, images, labels = module.to(device), images.to(device), labels.to(device)
    precision, compiled = mode.removesuffix("+compile"), mode.endswith("+compile")
    if compiled:
        module.visual.compile()
    train = _with_framework if way == "framework" else _bare
    with measured() as cost:
        watch, loss = train(module, images, labels, precision, arguments)
    on_device = device.type == "cuda"
    return {
        "images_per_second": arguments.steps * arguments.batch_size / watch.wall,
        "cpu_ms": 1000 * watch.cpu / arguments.steps,
        "memory_mib": (cost.peak_device_memory if on_device else cost.peak_memory) / 2**20,
        "loss": loss,
    }


class _Timed(Callback):
    """Times the steps after the first few, from the end of one to the end of another."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.watch = Stopwatch()
        self.loss = torch.zeros(())
        self._first, self._last = warmup, warmup + steps

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self._first:
            self.watch.start()
        if batch_idx + 1 == self._last:
            self.watch.stop()
            self.loss = outputs["loss"].detach()


class _Repeated:
    """The same batch again and again; of a list, Lightning would take each item for a loader."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self._batch = batch
        self._times = times

    def __len__(self) -> int:
        return self._times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self._batch, self._times)


def _with_framework(
    module: CLIPClassifier,
    images: Tensor,
    labels: Tensor,
    precision: Any,
    arguments: argparse.Namespace,
) -> tuple[Stopwatch, float]:
    timed = _Timed(arguments.warmup, arguments.steps)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=images.device.type,
        devices=1,
        precision=precision,
        callbacks=[MergeCallback("magmax"), timed],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _Repeated((images, labels), arguments.warmup + arguments.steps))
    return timed.watch, timed.loss.item()


def _bare(
    module: CLIPClassifier,
    images: Tensor,
    labels: Tensor,
    precision: str,
    arguments: argparse.Namespace,
) -> tuple[Stopwatch, float]:
    tower, head, steps = module.visual, module.head.weight, arguments.warmup + arguments.steps
    base = {name: weight.detach().clone() for name, weight in tower.named_parameters()}
    tower.train()
    optimizer = AdamW(tower.parameters(), lr=1e-5, weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    watch, loss = Stopwatch(), torch.zeros(())
    for step in range(steps):
        if step == arguments.warmup:
            watch.start()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision != "32-true"):
            features = tower(images)
        loss = F.cross_entropy(F.linear(F.normalize(features.float(), dim=-1), head), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    watch.stop()
    with torch.no_grad():
        vector = {name: weight - base[name] for name, weight in tower.named_parameters()}
    del vector
    return watch, loss.item()
