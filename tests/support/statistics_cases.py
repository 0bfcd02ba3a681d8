"""Modules and data small enough to watch what class statistics take up of them."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.zero_shot import ZeroShotHead

CLASSES, PIXELS, FEATURES = 4, 12, 6


class Exact(L.LightningModule):
    """Features and updates that float32 holds exactly, however images are spread over batches.

    Its images are small whole numbers, its weights multiples of 1/8, and every step moves all
    weights by 1/8 whatever the batch.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        whole = torch.randint(-8, 9, (FEATURES, PIXELS), generator=generator)
        self.encoder = nn.Linear(PIXELS, FEATURES)
        with torch.no_grad():
            self.encoder.weight.copy_(whole / 8)
            self.encoder.bias.fill_(0.5)
        rows = nn.functional.normalize(torch.randn(CLASSES, FEATURES, generator=generator))
        self.head = ZeroShotHead(10 * rows, list("abcd"))

    def features(self, images):
        return self.encoder(images.flatten(1))

    def training_step(self, batch, _):
        signs = torch.arange(FEATURES).remainder(2).mul(2).sub(1.0)
        return (self.encoder(torch.zeros(1, PIXELS)) * signs).sum() + (
            self.encoder.weight * signs[:, None]
        ).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.125)


class Normed(L.LightningModule):
    """A convolutional classifier with a batch norm, as anybody would write it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(PIXELS, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, FEATURES)
        )
        self.last = nn.Linear(FEATURES, CLASSES)

    def features(self, images):
        return self.encoder(images)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.last(self.features(images)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Tower(nn.Module):
    """An image encoder that ends as those of open_clip do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(PIXELS, 8)
        self.proj = nn.Parameter(torch.randn(8, FEATURES))

    def forward(self, images):
        return torch.relu(self.body(images.flatten(1))) @ self.proj


def clip():
    torch.manual_seed(0)
    rows = 10 * nn.functional.normalize(torch.randn(CLASSES, FEATURES))
    return CLIPClassifier(Tower(), ZeroShotHead(rows, list("abcd")), lr=0.05, warmup_steps=0)


def images_of(task, count=21):
    """Images of two classes; small whole numbers, no two alike."""
    generator = torch.Generator().manual_seed(task)
    labels = torch.randint(2, (count,), generator=generator) + 2 * task
    centres = torch.randint(-3, 4, (CLASSES, PIXELS), generator=torch.Generator().manual_seed(9))
    images = centres[labels] + torch.randint(-2, 3, (count, PIXELS), generator=generator)
    return images.float().reshape(count, 3, 2, 2), labels


def loader_of(task, *, shuffle=True, batch_size=8, count=21):
    return DataLoader(TensorDataset(*images_of(task, count)), batch_size, shuffle=shuffle)


def trainer_of(*callbacks, **options):
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet = QUIET | {"max_epochs": 2, "enable_checkpointing": saves}
    return L.Trainer(callbacks=list(callbacks), **quiet | options)


def learn(module, *callbacks, tasks=2, **options):
    for task in range(tasks):
        trainer_of(*callbacks, **options).fit(module, loader_of(task))
    return module


def naive_moments(features, labels):
    """Counts, means by class and the scatter around them, in float64, one image at a time."""
    vectors = [(f / f.norm()).double() for f in features.detach()]
    counts, means = torch.zeros(CLASSES), torch.zeros(CLASSES, features.shape[1]).double()
    for vector, label in zip(vectors, labels.tolist(), strict=True):
        counts[label] += 1
        means[label] += vector
    means /= counts.clamp(min=1)[:, None]
    scatter = torch.zeros(features.shape[1], features.shape[1]).double()
    for vector, label in zip(vectors, labels.tolist(), strict=True):
        scatter += torch.outer(vector - means[label], vector - means[label])
    return counts, means, scatter


def assert_moments(found, features, labels, atol=1e-4):
    """Compare `ClassGaussians` with those of features."""
    counts, means, scatter = naive_moments(features, labels)
    assert found.counts.tolist() == counts.tolist()
    torch.testing.assert_close(found.means, means, rtol=0, atol=atol)
    torch.testing.assert_close(found.scatter, scatter, rtol=0, atol=10 * atol)


def same_state(found, expected):
    """Whether two `ClassStatistics` hold the same bits."""
    one, two = found.statistics.state_dict(), expected.statistics.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
