"""What a run trains and tests, in plain torch: what the framework's cost is measured against.

No Lightning, no logs, no checkpoints, no file: the least that one would write for the same model,
the same images in the same order, and the same optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from cl_merge.config.schema import OptimizerConfig
from cl_merge.data.images import Transform, as_rgb

if TYPE_CHECKING:
    import datasets
    from PIL import Image

Order = Sequence[tuple[int, int]]
"""The images of an epoch, each with what to seed its augmentation with."""


@dataclass(frozen=True)
class BareTask:
    """A task as plain data."""

    rows: Sequence[int]  # of the training split
    labels: Sequence[int]  # of each row, as a position among the task's classes
    classes: Sequence[int]
    epochs: Sequence[Order]  # for each epoch the order of the rows


@dataclass
class BareStream:
    """A loop over tasks, which keeps the largest change of each weight."""

    tower: nn.Module  # the image tower, trained in its memory
    head: Tensor  # rows of all classes, float [C, D]
    images: datasets.Dataset  # the training split
    column: str  # its column of images
    transform: Transform  # augments an image
    batch_size: int
    optimizer: OptimizerConfig  # of AdamW and its schedule
    clip: float | None  # the largest norm of a gradient; None does not clip
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
        head = self.head[list(task.classes)]
        steps = len(task.epochs) * -(-len(photos) // self.batch_size)
        optimizer, schedule = self._optimizer(steps)
        for order in task.epochs:
            sampler: Any = order
            for images, labels in DataLoader(photos, self.batch_size, sampler=sampler):
                features = F.normalize(self.tower(images), dim=-1)
                loss = F.cross_entropy(
                    F.linear(features, head), labels, label_smoothing=self.optimizer.label_smoothing
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(self.tower.parameters(), self.clip)
                optimizer.step()
                schedule.step()
        return steps

    def _optimizer(self, steps: int) -> tuple[Optimizer, LambdaLR]:
        given = self.optimizer
        optimizer = AdamW(self.tower.parameters(), lr=given.lr, weight_decay=given.weight_decay)

        def factor(step: int) -> float:
            warmup = given.warmup_steps
            if step < warmup:
                return (step + 1) / warmup
            if given.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

        return optimizer, LambdaLR(optimizer, factor)


@torch.inference_mode()
def bare_test(
    tower: nn.Module,
    head: Tensor,
    images: Tensor,
    labels: Tensor,
    tasks: Tensor,
    outside: Tensor,
    batch_size: int,
) -> Tensor:
    """Count what a model gets right, in one pass over transformed images in memory.

    `outside` tells which classes are none of a task's, bool [T, C]; `head` has the rows of all.
    Returns, by task, correct among all classes, among the task's, and all images: int64 [3, T].
    """
    tower.eval()
    counts = torch.zeros(3, len(outside), dtype=torch.int64)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        logits = F.linear(F.normalize(tower(images[part]), dim=-1), head)
        aware = logits.masked_fill(outside[tasks[part]], -torch.inf)
        for row, scores in enumerate((logits, aware)):
            hits = scores.argmax(dim=1) == labels[part]
            counts[row].index_add_(0, tasks[part], hits.long())
        counts[2].index_add_(0, tasks[part], torch.ones_like(labels[part]))
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
