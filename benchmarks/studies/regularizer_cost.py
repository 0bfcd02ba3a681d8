"""What a training step costs with regularizers and merging, and in a bare loop: time, memory.

    python -m cl_merge.benchmarks.studies.regularizer_cost --model lite --batch-size 32
    python -m cl_merge.benchmarks.studies.regularizer_cost --kinds "bare loop" magmax

Trains on one batch of random images, each kind in a process of its own, so that none inherits
another's memory. Ratios are to the first kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import lightning as L
import open_clip
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from cl_merge.benchmarks.studies import harness
from cl_merge.benchmarks.studies.bare_loop import bare_steps
from cl_merge.callbacks import EWC, DriftPenalty, LwF, MergeCallback
from cl_merge.callbacks.regularizer import Penalty, Regularizer
from cl_merge.config.schema import OptimizerConfig
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.pretrained import load_clip
from cl_merge.models.zero_shot import ZeroShotHead
from cl_merge.training.cost import Meter

_IMAGES = 64  # of what takes each by itself: the empirical Fisher, and moments of features
_CLASSES = 100

BARE = "bare loop"  # the one kind without Lightning
_EMPIRICAL = partial(EWC, "empirical", samples=_IMAGES)
_MAGMAX = partial(MergeCallback, "magmax")
KINDS: dict[str, tuple[Callable[[], Callback], ...]] = {
    "plain": (),
    "lwf": (LwF,),
    "ewc-published": (partial(EWC, "published", samples=_IMAGES),),
    "ewc-empirical": (_EMPIRICAL,),
    "drift-penalty": (partial(DriftPenalty, samples=_IMAGES),),
    "lwf+ewc": (LwF, _EMPIRICAL),
    "lwf+magmax": (LwF, _MAGMAX),
    "magmax": (_MAGMAX,),
    BARE: (),
}
"""The kinds of training, each with its callbacks."""
PRECISIONS = ("32-true", "bf16-mixed", "bf16-mixed+compile")
_COLUMNS = (
    # Title, figure, digits, and whether it is relative to the first kind.
    ("images/s", "images_per_second", 1, False),
    ("ms a step", "step_ms", 1, False),
    ("ratio", "step_ms", 2, True),
    ("CPU ms a step", "cpu_ms", 1, False),
    ("peak MiB", "memory_mib", 0, False),
    ("ratio", "memory_mib", 2, True),
    ("at a task's end, ms an image", "end_ms", 1, False),
)

Batch = tuple[Tensor, Tensor]
Rounds = Sequence[Mapping[str, float]]
"""What was measured of a kind, round after round."""


def main() -> None:
    """Measure all kinds in turn, and print a table for each precision."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--model", default="glyph", help="as in cl-merge run, or an architecture")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["32-true"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS)[:-1])
    parser.add_argument("--steps", type=int, default=11, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that are timed")
    parser.add_argument("--repeat", type=int, default=1, help="processes for each")
    arguments = parser.parse_args()
    model, size = arguments.model, arguments.batch_size
    steps = arguments.steps, arguments.warmup
    for precision in arguments.precision:
        works = {
            kind: partial(harness.alone, measure, kind, precision, model, size, *steps)
            for kind in arguments.kinds
        }
        found = harness.alternated(works, arguments.repeat)
        first = next(iter(found.values()))
        harness.show(
            f"{model}, batch {size}, {precision}; median (range)",
            ["", *(title for title, *_ in _COLUMNS)],
            ([kind, *_cells(rounds, first)] for kind, rounds in found.items()),
        )


def _cells(rounds: Rounds, first: Rounds) -> Iterator[str]:
    for _, key, digits, relative in _COLUMNS:
        if key not in rounds[0]:
            yield ""
            continue
        others = [figures[key] if relative else 1 for figures in first]
        values = [own[key] / other for own, other in zip(rounds, others, strict=True)]
        yield harness.spread(values, digits)


def measure(
    kind: str, precision: str, model: str, batch_size: int, steps: int, warmup: int
) -> dict[str, float]:
    """Train in this process, on a GPU where there is one; regularizers are at work in task two."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, images, labels = _random_work(model, batch_size)
    module, batch = module.to(device), (images.to(device), labels.to(device))
    if precision.endswith("+compile"):
        module.visual.compile()
    clock = _Clock(warmup, warmup + steps)
    callbacks = [make() for make in KINDS[kind]]
    if any(isinstance(one, Regularizer) for one in callbacks):
        _fit(module, batch, precision, [clock, *callbacks], steps=2)
    ends = {one: harness.timed(one, "remember") for one in callbacks if isinstance(one, Penalty)}
    meter = Meter()
    if kind == BARE:
        _train_bare(module, batch, precision, clock)
    else:
        _fit(module, batch, precision, [clock, *callbacks], steps=warmup + steps)
    cost = meter.read()
    memory = cost.peak_device_memory if device.type == "cuda" else cost.peak_memory
    found = {
        "images_per_second": steps * batch_size / clock.watch.wall,
        "step_ms": 1000 * clock.watch.wall / steps,
        "cpu_ms": 1000 * clock.watch.cpu / steps,
        "memory_mib": memory / 2**20,
        "loss": clock.loss.item(),
    }
    for one, watch in ends.items():
        seen = batch_size * (warmup + steps)
        published = isinstance(one, EWC) and one.kind == "published"
        found["end_ms"] = 1000 * watch.wall / (seen if published else min(_IMAGES, seen))
    return found


def _random_work(name: str, count: int) -> tuple[CLIPClassifier, Tensor, Tensor]:
    """Make a classifier of random classes, and random images with labels."""
    if name in open_clip.list_models():
        model: Any = open_clip.create_model(name, load_weights=False)
    else:
        model = load_clip(name).model
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images, labels = torch.randn(count, 3, height, width), torch.randint(0, _CLASSES, (count,))
    with torch.no_grad():
        features = model.visual.eval()(images[:1]).shape[1]
    rows = 100 * nn.functional.normalize(torch.randn(_CLASSES, features), dim=1)
    head = ZeroShotHead(rows, [f"class {i}" for i in range(_CLASSES)])
    return CLIPClassifier(model.visual, head, warmup_steps=0), images, labels


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
    tower, head, steps = module.visual, module.head.weight, clock.last
    base = {name: weight.detach().clone() for name, weight in tower.named_parameters()}
    tower.train()
    options = OptimizerConfig(warmup_steps=0)
    losses = bare_steps(tower, head, repeat(batch, steps), steps, options, precision=precision)
    for step, loss in enumerate(losses, start=1):
        clock.ended(step, loss)
    with torch.no_grad():  # the task vector, as the framework makes one
        [weight - base[name] for name, weight in tower.named_parameters()]


if __name__ == "__main__":
    main()
