"""A merge method of one's own, in MergeCallback and on the command line.

    python own_merger.py FOLDER
    cl-merge merge FOLDER/base.safetensors FOLDER/task*.safetensors \
        --method own_merger.py:decay --set rate=0.7 --out FOLDER/merged.safetensors

The first command trains two tasks with the method, the second merges what it wrote to FOLDER. Both
give the same bits.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge import fold_method, merge_method
from cl_merge.callbacks import MergeCallback
from cl_merge.storage.files import save_tensors


@fold_method("decay")
def decay(merged: Tensor, vector: Tensor, task: int, *, rate: float = 0.5) -> Tensor:
    """Average over time, task by task: [n], [n] -> [n], in constant memory."""
    return rate * merged + (1 - rate) * vector if task else vector


@merge_method("shared-sign")
def shared_sign(values: Tensor) -> Tensor:
    """Average what all tasks moved the same way, leave the rest: [tasks, n] -> [n]."""
    agree = values.sign().sum(dim=0).abs() == len(values)
    return torch.where(agree, values.mean(dim=0), 0)


class Classifier(L.LightningModule):
    """A linear classifier of 8 x 8 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, afresh for every task."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(folder: Path) -> None:
    """Train two tasks, digits below five and the others, and write what the command line merges."""
    L.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    labels = torch.tensor(load_digits().target)
    module = Classifier()
    merge = MergeCallback(decay(rate=0.7), directory=folder)
    for task in (labels < 5, labels >= 5):
        loader = DataLoader(TensorDataset(images[task], labels[task]), batch_size=32, shuffle=True)
        trainer(merge).fit(module, loader)

    merge.install(module)
    save_tensors(folder / "base.safetensors", merge.base, {})
    save_tensors(folder / "by_callback.safetensors", dict(module.state_dict()), {})
    print(f"merged {merge.tasks} tasks with {merge.merger.name}, {merge.merger.options}")
    print("wrote", *sorted(path.name for path in folder.iterdir()))


def trainer(*callbacks: L.Callback) -> L.Trainer:
    """Make a trainer that keeps quiet: each task has a new one."""
    return L.Trainer(
        max_epochs=2,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
