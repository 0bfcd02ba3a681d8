"""MergeCallback with LoRA adapters of peft: two tasks, one merged adapter.

    python lora.py FOLDER

A small network knows handwritten digits. An adapter learns them mirrored, then noisy, is merged and
saved so that `PeftModel.from_pretrained` loads it. Nothing is downloaded; any model that peft can
adapt goes in its place.

MergeCallback merges what trains: the factors A and B of each adapter, apart. The weight that the
model sees is W + s BA, and a merge of factors is not the merge of products: the merged B meets a
merged A that it was never trained with. Even plain averages differ,

    (B1 + B2)/2 (A1 + A2)/2 = (B1 A1 + B1 A2 + B2 A1 + B2 A2)/4  instead of  (B1 A1 + B2 A2)/2.

The merged factors are an adapter of the same rank, as small as each. The merged products have no
such rank any more: they go into the full weights. Both are shown below, with their distance.
"""

import sys
from copy import deepcopy
from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cl_merge import merge as merge_vectors
from cl_merge.callbacks import MergeCallback

Weights = dict[str, Tensor]


class Classifier(L.LightningModule):
    """A classifier, adapted or not, that knows nothing of merging.

    Args:
        model: The classifier; what has `requires_grad` trains.
        lr: Learning rate.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy of a batch."""
        images, labels = batch
        right = self.model(images).argmax(dim=1) == labels
        self.log("accuracy", right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, afresh for every task."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def main(folder: Path) -> None:
    """Train two adapters and merge them in both ways; print the accuracy on each task."""
    L.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    noisy = images + 0.4 * torch.randn_like(images)
    (plain, _), *tasks = (loaders(task) for task in (images, images.flip(3), noisy))
    tests = [test for _, test in tasks]
    print(f"{'':16} mirrored    noisy")

    base = network()
    trainer(8).fit(Classifier(base, lr=1e-3), plain)  # stands for the pre-training
    show("pre-trained", Classifier(base, lr=0), tests)

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["1", "3", "5"])
    module = Classifier(get_peft_model(deepcopy(base), config), lr=3e-3)
    merge = MergeCallback("magmax")
    changes: list[Weights] = []
    for train, _ in tasks:
        trainer(6, merge).fit(module, train)
        changes.append(products(module.model))
    show("fine-tuned", module, tests)

    merge.install(module)
    show("merged factors", module, tests)
    of_factors = products(module.model)
    module.model.save_pretrained(folder)  # a few kilobytes: the adapter without the model

    of_products = merge_vectors(changes, "magmax")
    full = deepcopy(base)
    full.load_state_dict(of_products.apply_to(full.state_dict(), scale=merge.scale))
    show("merged products", Classifier(full, lr=0), tests)

    scaled = {name: merge.scale * change for name, change in of_products.items()}
    print(f"distance of the two, relative to the products: {distance(of_factors, scaled):.2f}")

    loaded = PeftModel.from_pretrained(deepcopy(base), folder)
    show("loaded adapter", Classifier(loaded, lr=0), tests)


def network() -> nn.Sequential:
    """Make a network for 8 x 8 pictures, at random."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 256), nn.GELU()),
        *(nn.Linear(256, 256), nn.GELU()),
        nn.Linear(256, 10),
    )


def products(model: nn.Module) -> Weights:
    """What each adapter adds to the weight below it, s BA [out, in], by that weight's name."""
    return {
        name.removeprefix("base_model.model.") + ".weight": layer.get_delta_weight(
            "default"
        ).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def distance(one: Weights, other: Weights) -> float:
    """Norm of the difference of two sets of weights, relative to that of the second."""
    difference, size = (
        torch.cat([values.flatten() for values in found]).norm()
        for found in ((one[name] - other[name] for name in other), other.values())
    )
    return (difference / size).item()


def loaders(images: Tensor) -> tuple[DataLoader, DataLoader]:
    """Make the loaders of training and test images of a task."""
    labels = torch.tensor(load_digits().target)
    train, test = (
        TensorDataset(images[part], labels[part]) for part in (slice(1200), slice(1200, None))
    )
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=600)


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


def show(what: str, module: Classifier, tests: list[DataLoader]) -> None:
    """Print the accuracy on each task, in per cent."""
    found = [trainer().test(module, test, verbose=False)[0]["accuracy"] for test in tests]
    print(f"{what:16}", " ".join(f"{100 * accuracy:8.1f}" for accuracy in found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
