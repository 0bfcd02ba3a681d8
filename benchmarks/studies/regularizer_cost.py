"""What LwF and EWC cost beside plain training: time of a step, peak memory, the Fisher pass.

    python -m cl_merge.benchmarks.studies.regularizer_cost --model lite --batch-size 32

Random images. On a CPU each measurement has a process of its own, so that none inherits another's
memory; a GPU tells the memory of each.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from cl_merge.benchmarks.studies import harness
from cl_merge.callbacks import EWC, LwF, MergeCallback
from cl_merge.training.cost import Meter

KINDS = ("plain", "lwf", "ewc-published", "ewc-empirical", "lwf+ewc", "magmax", "lwf+magmax")
STEPS = 12
_FISHER_IMAGES = 64  # of the empirical Fisher, which takes each by itself
_MODULE = "cl_merge.benchmarks.studies.regularizer_cost"


def main() -> None:
    """Measure every kind and print a table; ratios are to plain training."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--model", default="glyph", help="as in cl-merge run, or an architecture")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--only", choices=KINDS, help="measure one, and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        harness.tell(measure(arguments.only, arguments))
        return
    table = harness.new_table(
        f"{arguments.model}, batch {arguments.batch_size}, {arguments.precision}",
        "", "step, ms", "ratio", "memory, MiB", "ratio", "Fisher, ms/image",
    )  # fmt: skip
    plain: dict[str, float] = {}
    for kind in KINDS:
        on_gpu = torch.cuda.is_available()
        found = measure(kind, arguments) if on_gpu else harness.alone(_MODULE, kind)
        memory = found["device_mib"] or found["memory_mib"]
        plain = plain or {"step": found["step_ms"], "memory": memory}
        table.add_row(
            kind,
            f"{found['step_ms']:.1f}",
            f"{found['step_ms'] / plain['step']:.2f}",
            f"{memory:.0f}",
            f"{memory / plain['memory']:.2f}",
            f"{found['fisher_ms_per_image']:.1f}" if "fisher_ms_per_image" in found else "",
        )
    harness.show(table)


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train two short tasks, and measure the second, in which the regularizers are at work.

    Returns:
        Milliseconds of a step (median), peak memory of the process and of the device in MiB, and
        milliseconds of the Fisher pass per image.
    """
    count = STEPS * arguments.batch_size
    module, images, labels = harness.random_work(arguments.model, count)
    clock = _Clock()
    callbacks: list[Callback] = [clock]
    if "lwf" in kind:
        callbacks.append(LwF())
    ewc = _TimedEWC("published" if kind == "ewc-published" else "empirical", samples=_FISHER_IMAGES)
    if "ewc" in kind:
        callbacks.append(ewc)
    if "magmax" in kind:
        callbacks.append(MergeCallback("magmax"))
    data = DataLoader(TensorDataset(images, labels), batch_size=arguments.batch_size)
    for task in range(2):
        clock.steps.clear()
        trainer = L.Trainer(
            max_epochs=1,
            callbacks=callbacks,
            precision=arguments.precision,
            limit_train_batches=2 if task == 0 else 1.0,
            **harness.QUIET,
        )
        meter = Meter()
        trainer.fit(module, data)
        cost = meter.read()
    found = {
        "step_ms": 1000 * statistics.median(clock.steps[1:]),
        "memory_mib": cost.peak_memory / 2**20,
        "device_mib": cost.peak_device_memory / 2**20,
    }
    if "ewc" in kind:
        seen = count if kind == "ewc-published" else min(_FISHER_IMAGES, count)
        found["fisher_ms_per_image"] = 1000 * ewc.seconds / seen
    return found


class _Clock(Callback):
    """Times steps."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._watch = harness.Stopwatch()

    @override
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watch = harness.Stopwatch()
        self._watch.start()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watch.stop()
        self.steps.append(self._watch.wall)


class _TimedEWC(EWC):
    """Times the Fisher pass."""

    seconds = 0.0

    @override
    def remember(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        watch = harness.Stopwatch()
        with watch:
            super().remember(trainer, pl_module)
        self.seconds = watch.wall


if __name__ == "__main__":
    main()
