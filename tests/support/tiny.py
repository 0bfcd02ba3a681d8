"""A model and data small enough to train whole streams in tests."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn

from cl_merge.data.task_stream import TaskStream
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.zero_shot import ZeroShotHead

NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]


def splits(classes: int = 6, train: int = 12, test: int = 5) -> dict[str, datasets.Dataset]:
    """Noisy 8 x 8 pictures, each class around a pattern of its own."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (classes, 8, 8, 3))

    def table(count: int) -> datasets.Dataset:
        labels = [label for label in range(classes) for _ in range(count)]
        noisy = [np.clip(patterns[c] + random.normal(0, 60, (8, 8, 3)), 0, 255) for c in labels]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES[:classes])}
        )
        images = [Image.fromarray(pixels.astype(np.uint8)) for pixels in noisy]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    return {"train": table(train), "test": table(test)}


def classifier(classes: int = 6, **options) -> CLIPClassifier:
    """A linear image encoder under a random head; the same weights at every call."""
    generator = torch.Generator().manual_seed(0)
    visual = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
    with torch.no_grad():
        visual[1].weight.copy_(torch.randn(16, 192, generator=generator) / 14)
        visual[1].bias.zero_()
    rows = nn.functional.normalize(torch.randn(classes, 16, generator=generator), dim=1)
    head = ZeroShotHead(10 * rows, NAMES[:classes])
    return CLIPClassifier(visual, head, **{"lr": 0.01, "warmup_steps": 0} | options)


def stream(**options) -> TaskStream:
    return TaskStream(splits(), **{"tasks": 3, "batch_size": 8} | options)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
