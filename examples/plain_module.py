"""MergeCallback in a plain loop: two fits of a LightningModule, then one merged model.

    python plain_module.py

A small network knows handwritten digits. It learns them mirrored, then noisy. Fine-tuning forgets
the first task over the second; the merged model forgets less.
"""

from collections.abc import Iterable

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.callbacks import MergeCallback


class Classifier(L.LightningModule):
    """A classifier of 8 x 8 pictures that knows nothing of merging."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU()),
            *(nn.Flatten(), nn.Linear(1024, 10)),
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy of a batch."""
        images, labels = batch
        right = self.net(images).argmax(dim=1) == labels
        self.log("accuracy", right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, afresh for every task."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train and merge; print the accuracy on each task, in per cent."""
    L.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(load_digits().target)
    plain, mirrored, noisy = (
        loaders(task, labels)
        for task in (images, images.flip(3), images + 0.4 * torch.randn_like(images))
    )
    tests = [mirrored[1], noisy[1]]

    module = Classifier()
    trainer(8).fit(module, plain[0])  # stands for the pre-training
    print(f"{'':12} mirrored    noisy")
    show("pre-trained", trainer(), module, tests)

    merge = MergeCallback("magmax", scale=0.8)  # the published 0.5 was chosen for CLIP
    for train, _ in (mirrored, noisy):
        trainer(3, merge).fit(module, train)  # trains on from where the last task stopped

    show("fine-tuned", trainer(), module, tests)
    show("merged", trainer(1, merge), module, tests)
    merge.install(module)  # keeps the merged weights, to be saved like any others


def loaders(images: Tensor, labels: Tensor) -> tuple[DataLoader, DataLoader]:
    """Make the loaders of training and test images of a task."""
    train, test = (TensorDataset(images[part], labels[part]) for part in (TRAIN, TEST))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=500)


def trainer(epochs: int = 1, *callbacks: L.Callback) -> L.Trainer:
    """Make a trainer that keeps quiet: each task has a new one."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def show(
    what: str, trainer: L.Trainer, module: L.LightningModule, tests: Iterable[DataLoader]
) -> None:
    """Print the accuracy on each task."""
    found = [trainer.test(module, test, verbose=False)[0]["accuracy"] for test in tests]
    print(f"{what:12}", " ".join(f"{100 * accuracy:8.1f}" for accuracy in found))


TRAIN, TEST = slice(1200), slice(1200, None)

if __name__ == "__main__":
    main()
