"""Class statistics beside MergeCallback, in a module that is no CLIP.

    python class_statistics.py

Merging keeps what each task taught the encoder, but a linear head that saw the classes of one task
at a time mixes them up. Statistics of the features, a mean per class and one covariance, tell
them apart; no image is kept.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.callbacks import ClassStatistics, MergeCallback

TASKS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))


class Classifier(L.LightningModule):
    """A classifier of 8 x 8 pictures that asks the statistics too, where it is given them."""

    def __init__(self, statistics: ClassStatistics) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
            *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GELU()),
            *(nn.Flatten(), nn.Linear(512, 64)),
        )
        self.head = nn.Linear(64, 10)
        self.statistics = statistics

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.encoder(images)), labels)

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy of head and of statistics, among all ten classes."""
        images, labels = batch
        logits = {
            "head": self.head(self.encoder(images)),
            "statistics": self.statistics.classify(self, batch),
        }
        for name, found in logits.items():
            right = found.argmax(dim=1) == labels
            self.log(name, right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, afresh for every task."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def features(module: Classifier, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [B, D] and labels [B]: what the statistics are taken of."""
    images, labels = batch
    return module.encoder(images), labels


def main() -> None:
    """Train three tasks of new classes; print the accuracy among all classes, in per cent."""
    L.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(load_digits().target)
    test = DataLoader(TensorDataset(images[TEST], labels[TEST]), batch_size=500)

    # "base": this small encoder moves too far from task to task for statistics of merged features;
    # those of a large pre-trained one do well with the default, "both".
    statistics = ClassStatistics("base", features=features, classes=10)
    callbacks = [MergeCallback("magmax"), statistics]  # in this order: statistics read the merged
    module = Classifier(statistics)
    print("             head  statistics")
    for number, classes in enumerate(TASKS, start=1):
        task = torch.isin(labels[TRAIN], torch.tensor(classes))
        chosen = TensorDataset(images[TRAIN][task], labels[TRAIN][task])
        fit = trainer(*callbacks)
        fit.fit(module, DataLoader(chosen, batch_size=32, shuffle=True))
        found = fit.test(module, test, verbose=False)[0]
        print(f"after task {number} {100 * found['head']:5.1f} {100 * found['statistics']:11.1f}")


def trainer(*callbacks: L.Callback) -> L.Trainer:
    """Make a trainer that keeps quiet: each task has a new one."""
    return L.Trainer(
        max_epochs=3,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


TRAIN, TEST = slice(1200), slice(1200, None)

if __name__ == "__main__":
    main()
