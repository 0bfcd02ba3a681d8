"""Modules and data as they are found with people who learn continually."""

from __future__ import annotations

import torch
from plain import Plain, loader
from torch import nn


def grow(module, classes):
    """A head for more classes, with the rows that there were."""
    old, new = module.net[2], nn.Linear(8, classes)
    torch.manual_seed(classes)
    new.reset_parameters()
    with torch.no_grad():
        new.weight[: len(old.weight)], new.bias[: len(old.bias)] = old.weight, old.bias
    module.net[2] = new


class Heads(Plain):
    """A new head for each task, as task-incremental models have it."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict()
        self.add()

    def add(self):
        self.heads[str(len(self.heads))] = nn.Linear(3, 3)

    def forward(self, images):
        return self.heads[str(len(self.heads) - 1)](super().forward(images))


class Backbone(Plain):
    """What Lightning's BackboneFinetuning asks for."""

    def __init__(self):
        super().__init__()
        self.backbone, self.net = self.net[:2], self.net[2]

    def forward(self, images):
        return self.net(self.backbone(images))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Single(Plain):
    """One output, trained with a loss of binary labels or of numbers."""

    def __init__(self, loss):
        super().__init__()
        self.net[2] = nn.Linear(8, 1)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        outputs, targets = self(batch[0])[:, 0], (batch[1] > 0).float()
        if self.loss == "mse":
            return 0.5 * (outputs - targets).square().sum()
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        images, labels = next(iter(loader(0)))
        while True:
            yield from zip(images, labels, strict=True)
