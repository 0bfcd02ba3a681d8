"""A loop that knows nothing of this library: a classifier as anybody would write it."""

from __future__ import annotations

import inspect
import os

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Set to cuda, the same claims are tested on a GPU.
ACCELERATOR = os.environ.get("CL_MERGE_TEST_ACCELERATOR", "cpu")


class Plain(L.LightningModule):
    """A classifier as anybody would write it; it records the weights that each hook sees."""

    def __init__(self, *, batch_norm=False, lr=0.1, fused=False):
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(8)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(4, 8), *norm, nn.Tanh(), nn.Linear(8, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.lr = lr
        self.fused = fused
        self.seen = {}

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen["validation"] = weights(self)

    def test_step(self, batch, batch_idx):
        self.seen["test"] = weights(self)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"] = weights(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=self.fused)


# Versions of lightning before 2.6 read their own checkpoints unasked.
SAFE = (
    {"weights_only": True} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}
)


def weights(module):
    return {
        name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[n].cpu(), second[n].cpu()) for n in first
    )


def loader(task):
    generator = torch.Generator().manual_seed(task)
    images = torch.randn(24, 4, generator=generator)
    labels = torch.randint(0, 3, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def trainer(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": ACCELERATOR,
        "max_epochs": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **quiet | options)


def fit(module, callbacks, task, **options):
    callbacks = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    trainer(*callbacks, **options).fit(module, loader(task))
    return weights(module)
