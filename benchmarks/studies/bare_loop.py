"""What a run trains and tests, in plain torch: what the framework's cost is measured against.

No Lightning, no logs, no checkpoints, no file: the least that one would write for the same model,
the same images in the same order, and the same optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from cl_merge.config.schema import OptimizerConfig, RunConfig
from cl_merge.data.images import Transform, as_rgb

if TYPE_CHECKING:
    import datasets
    from PIL import Image


@dataclass(frozen=True)
class BareTask:
    """A task as plain data."""

    rows: Sequence[int]  # of the training split
    labels: Sequence[int]  # of each row, as a position among the task's classes
    classes: Sequence[int]
    # For each epoch the images in their order, each with what to seed its augmentation with.
    epochs: Sequence[Sequence[tuple[int, int]]]


@dataclass
class BareStream:
    """A loop over tasks, which keeps the largest change of each weight."""

    tower: nn.Module  # the image tower, trained in its memory
    head: Tensor  # rows of all classes, float [C, D]
    images: datasets.Dataset  # the training split
    column: str  # its column of images
    transform: Transform  # augments an image
    config: RunConfig
    merged: dict[str, Tensor] = field(default_factory=dict)  # by MagMax, of the tasks so far

    def train(self, tasks: Sequence[BareTask]) -> Iterator[int]:
        """Train on one task after another; yields its steps when each is trained and merged."""
        base = {name: weight.detach().clone() for name, weight in self.tower.named_parameters()}
        self.merged = {name: torch.zeros_like(weight) for name, weight in base.items()}
        self.tower.train()
        for module in self.tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for task in tasks:
            steps = self._train_task(task)
            with torch.no_grad():
                for name, weight in self.tower.named_parameters():
                    vector, kept = weight - base[name], self.merged[name]
                    self.merged[name] = torch.where(vector.abs() >= kept.abs(), vector, kept)
            yield steps

    def _train_task(self, task: BareTask) -> int:
        decoded = [as_rgb(self.images[row][self.column]) for row in task.rows]
        photos = _Photos(decoded, task.labels, self.transform)
        size, clip = self.config.stream.batch_size, self.config.trainer.get("gradient_clip_val")
        steps = len(task.epochs) * -(-len(photos) // size)
        samplers: Any = task.epochs
        batches = (batch for order in samplers for batch in DataLoader(photos, size, sampler=order))
        head = self.head[list(task.classes)]
        for _ in bare_steps(self.tower, head, batches, steps, self.config.optimizer, clip):
            pass
        return steps


def bare_steps(
    tower: nn.Module,
    head: Tensor,
    batches: Iterable[Sequence[Tensor]],
    steps: int,
    options: OptimizerConfig,
    clip: float | None = None,
    precision: str = "32-true",
) -> Iterator[Tensor]:
    """Train an image tower on so many batches; yields the loss when each step is done.

    `clip` is the largest norm of a gradient; None does not clip.
    """
    optimizer = AdamW(tower.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = LambdaLR(optimizer, partial(_factor, options, steps))
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision != "32-true"):
            features = tower(images)
        logits = F.linear(F.normalize(features.float(), dim=-1), head)
        loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(tower.parameters(), clip)
        optimizer.step()
        schedule.step()
        yield loss


def _factor(options: OptimizerConfig, steps: int, step: int) -> float:
    warmup = options.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.inference_mode()
def bare_test(
    tower: nn.Module, head: Tensor, samples: Sequence[Tensor], outside: Tensor, batch_size: int
) -> Tensor:
    """Count what a model gets right, in one pass over transformed images in memory.

    Samples are images with their labels and tasks; `outside` tells which classes are none of a
    task's, bool [T, C]; `head` has the rows of all. Returns, by task, correct among all classes,
    among the task's, and all images: int64 [3, T].
    """
    tower.eval()
    counts = torch.zeros(3, len(outside), dtype=torch.int64)
    for images, labels, tasks in zip(
        *(torch.split(part, batch_size) for part in samples), strict=True
    ):
        logits = F.linear(F.normalize(tower(images), dim=-1), head)
        aware = logits.masked_fill(outside[tasks], -torch.inf)
        for row, scores in enumerate((logits, aware)):
            counts[row].index_add_(0, tasks, (scores.argmax(dim=1) == labels).long())
        counts[2].index_add_(0, tasks, torch.ones_like(labels))
    return counts


@dataclass
class _Photos(Dataset[tuple[Tensor, int]]):
    images: Sequence[Image.Image]
    labels: Sequence[int]
    transform: Transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = draw
        torch.default_generator.manual_seed(seed)
        return self.transform(self.images[index]), self.labels[index]
