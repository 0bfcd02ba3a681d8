"""MergeCallback under LightningCLI: a process per task, the state in checkpoints.

    python main.py fit -c config.yaml --data.task plain --trainer.callbacks null --to base.ckpt
    python main.py fit -c config.yaml --data.task mirrored --after base.ckpt --to one.ckpt
    python main.py fit -c config.yaml --data.task noisy --after one.ckpt --to two.ckpt
    python main.py test -c config.yaml --data.task mirrored --ckpt_path two.ckpt

MergeCallback stands in config.yaml, under trainer.callbacks; the first command is a pre-training
without it. The last one tests the merged weights (with `--trainer.callbacks null` the fine-tuned
ones). Lightning's own `--ckpt_path` goes on with a fit that was stopped, epochs, steps and
optimizer included; a new task takes up weights and MergeCallback alone: that is `--after`.
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.callbacks import MergeCallback


class StreamCLI(LightningCLI):
    """LightningCLI, where a fit goes on from the end of the task before."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a stream needs beside the options of model, data and trainer."""
        parser.add_argument("--after", type=str | None, help="checkpoint of the task before")
        parser.add_argument("--to", type=str | None, help="where to write this task's checkpoint")

    def before_fit(self) -> None:
        """Take up the weights that the task before left, and what MergeCallback knows of it."""
        if self.config["fit"]["after"] is None:
            return
        checkpoint = torch.load(self.config["fit"]["after"], weights_only=True)
        self.model.load_state_dict(checkpoint["state_dict"])
        for callback in self.trainer.callbacks:
            # The pre-training has none.
            if (
                isinstance(callback, MergeCallback)
                and callback.state_key in checkpoint["callbacks"]
            ):
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])

    def after_fit(self) -> None:
        """Write the checkpoint once the task is merged; one of ModelCheckpoint is too early."""
        if self.config["fit"]["to"] is not None:
            self.trainer.save_checkpoint(self.config["fit"]["to"])


class Classifier(L.LightningModule):
    """A classifier of 8 x 8 pictures that knows nothing of merging.

    Args:
        channels: Width of its convolutions.
        lr: Learning rate.
    """

    def __init__(self, channels: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.GELU()),
            *(nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2), nn.GELU()),
            *(nn.Flatten(), nn.Linear(32 * channels, 10)),
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
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Digits(L.LightningDataModule):
    """Handwritten digits, as one of several tasks.

    Args:
        task: What is done to the images: plain, mirrored or noisy.
        batch_size: Training images in a batch.
    """

    def __init__(self, task: str = "plain", batch_size: int = 32) -> None:
        super().__init__()
        images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
        noise = 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        tasks = {"plain": images, "mirrored": images.flip(3), "noisy": images + noise}
        self.data = TensorDataset(tasks[task], torch.tensor(load_digits().target))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Give the first 1,200 images."""
        train = torch.utils.data.Subset(self.data, range(1200))
        return DataLoader(train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """Give the other images."""
        return DataLoader(torch.utils.data.Subset(self.data, range(1200, 1797)), batch_size=600)


if __name__ == "__main__":
    StreamCLI(Classifier, Digits, save_config_callback=None)
