"""What a training step costs with LwF, EWC and merging, and in a bare loop: time, memory, Fisher.

    python -m cl_merge.benchmarks.studies.regularizer_cost --model lite --batch-size 32

Trains on one batch of random images, each kind in a process of its own, so that none inherits
another's memory. Ratios are to the first kind.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
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
from cl_merge.callbacks import EWC, LwF, MergeCallback
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.training.cost import Meter

BARE = "bare loop"  # the one kind without Lightning
REGULARIZED = ("lwf", "ewc-published", "ewc-empirical", "lwf+ewc", "lwf+magmax")
KINDS = ("plain", *REGULARIZED, "magmax", BARE)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-mixed+compile")
_FISHER_IMAGES = 64  # of the empirical Fisher, which takes each by itself

Batch = tuple[Tensor, Tensor]
Rounds = Sequence[Mapping[str, float]]
"""What was measured of a kind, round after round."""


def main() -> None:
    """Measure every kind and print a table."""
    parser = harness.new_parser(__doc__)
    add_arguments(parser)
    run(parser.parse_args(), "cl_merge.benchmarks.studies.regularizer_cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be asked for."""
    parser.add_argument("--model", default="glyph", help="as in cl-merge run, or an architecture")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["32-true"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:-1])
    parser.add_argument("--steps", type=int, default=11, help="steps that are timed")
    parser.add_argument("--repeat", type=int, default=1, help="processes for each")
    parser.add_argument("--only", help="measure one in this process, and print JSON")
    parser.set_defaults(warmup=1)  # steps before those that are timed


def run(arguments: argparse.Namespace, module: str) -> None:
    """Measure all kinds in turn, in processes of the module's command; a table a precision."""
    if arguments.only:
        precision, kind = arguments.only.split("/")
        sizes = arguments.batch_size, arguments.steps, arguments.warmup
        harness.tell(measure(kind, precision, arguments.model, *sizes))
        return
    for precision in arguments.precision:
        works = {
            kind: partial(harness.alone, module, f"{precision}/{kind}") for kind in arguments.kinds
        }
        title = f"{arguments.model}, batch {arguments.batch_size}, {precision}"
        harness.show(_table(title, harness.alternated(works, arguments.repeat)))


def measure(
    kind: str, precision: str, model: str, batch_size: int, steps: int, warmup: int
) -> dict[str, float]:
    """Train in this process, on a GPU where there is one; regularizers are at work in task two."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, images, labels = harness.random_work(model, batch_size)
    module, batch = module.to(device), (images.to(device), labels.to(device))
    if precision.endswith("+compile"):
        module.visual.compile()
    clock = _Clock(warmup, warmup + steps)
    ewc = _TimedEWC("published" if kind == "ewc-published" else "empirical", samples=_FISHER_IMAGES)
    callbacks: list[Callback] = [clock]
    callbacks += [LwF()] if "lwf" in kind else []
    callbacks += [ewc] if "ewc" in kind else []
    callbacks += [MergeCallback("magmax")] if "magmax" in kind else []
    if kind in REGULARIZED:
        _fit(module, batch, precision, callbacks, steps=2)
    meter = Meter()
    if kind == BARE:
        _train_bare(module, batch, precision, clock)
    else:
        _fit(module, batch, precision, callbacks, steps=warmup + steps)
    cost = meter.read()
    memory = cost.peak_device_memory if device.type == "cuda" else cost.peak_memory
    found = {
        "images_per_second": steps * batch_size / clock.watch.wall,
        "step_ms": 1000 * clock.watch.wall / steps,
        "cpu_ms": 1000 * clock.watch.cpu / steps,
        "memory_mib": memory / 2**20,
        "loss": clock.loss.item(),
    }
    if "ewc" in kind:
        images_seen = batch_size * (warmup + steps)
        seen = images_seen if ewc.kind == "published" else min(_FISHER_IMAGES, images_seen)
        found["fisher_ms"] = 1000 * ewc.watch.wall / seen
    return found


class _Clock(Callback):
    """Times steps, from the end of one to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.watch = harness.Stopwatch()
        self.loss = torch.zeros(())
        self.first, self.last = first, last

    def ended(self, step: int, loss: Tensor) -> None:
        """Hear that so many steps are done."""
        if step == self.first:
            self.watch = harness.Stopwatch()
            self.watch.start()
        if step == self.last:
            self.watch.stop()
            self.loss = loss.detach()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ended(batch_idx + 1, outputs["loss"])


class _TimedEWC(EWC):
    """Times the Fisher pass."""

    @override
    def remember(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch = harness.Stopwatch()
        with self.watch:
            super().remember(trainer, pl_module)


def _fit(
    module: CLIPClassifier, batch: Batch, precision: str, callbacks: list[Callback], *, steps: int
) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=batch[0].device.type,
        devices=1,
        precision=precision.removesuffix("+compile"),  # type: ignore[arg-type]
        callbacks=callbacks,
        **harness.QUIET,
    )
    batches: Any = list(repeat(batch, steps))
    trainer.fit(module, DataLoader(batches, batch_size=None))


def _train_bare(module: CLIPClassifier, batch: Batch, precision: str, clock: _Clock) -> None:
    images, labels = batch
    tower, head, steps = module.visual, module.head.weight, clock.last
    base = {name: weight.detach().clone() for name, weight in tower.named_parameters()}
    tower.train()
    optimizer = AdamW(tower.parameters(), lr=1e-5, weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step in range(1, steps + 1):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision != "32-true"):
            features = tower(images)
        loss = F.cross_entropy(F.linear(F.normalize(features.float(), dim=-1), head), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        clock.ended(step, loss)
    with torch.no_grad():  # the task vector, as the framework makes one
        [weight - base[name] for name, weight in tower.named_parameters()]


def _table(title: str, found: Mapping[str, Rounds]) -> Any:
    table = harness.new_table(
        f"{title}; median (range)",
        "", "images/s", "ms a step", "ratio", "CPU ms a step", "peak MiB", "ratio",
        "Fisher, ms an image",
    )  # fmt: skip
    first = next(iter(found.values()))
    for kind, rounds in found.items():
        table.add_row(kind, *_cells(rounds, first))
    return table


def _cells(rounds: Rounds, first: Rounds) -> Iterator[str]:
    def spread(key: str) -> harness.Spread:
        return harness.Spread.of([figures[key] for figures in rounds])

    def ratio(key: str) -> harness.Spread:
        pairs = zip(rounds, first, strict=True)
        return harness.Spread.of([own[key] / other[key] for own, other in pairs])

    yield f"{spread('images_per_second'):.1f}"
    yield f"{spread('step_ms'):.1f}"
    yield f"{ratio('step_ms'):.2f}"
    yield f"{spread('cpu_ms'):.1f}"
    yield f"{spread('memory_mib'):.0f}"
    yield f"{ratio('memory_mib'):.2f}"
    yield f"{spread('fisher_ms'):.1f}" if "fisher_ms" in rounds[0] else ""


if __name__ == "__main__":
    main()
