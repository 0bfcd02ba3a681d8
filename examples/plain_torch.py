"""StreamMerger in a loop of one's own, here with Fabric: no LightningModule, no Trainer.

    python plain_torch.py

A small network knows handwritten digits. It learns them mirrored, then noisy, and is tested merged.
Without Fabric the three lines with `fabric` go, and `loss.backward()` stands for one of them.
"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cl_merge import StreamMerger


def main() -> None:
    """Train and merge; print the accuracy on each task, in per cent."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu")
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(load_digits().target)
    tasks = [images.flip(3), images + 0.4 * torch.randn_like(images)]
    module = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU()),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    )
    train(fabric, module, images, labels, epochs=8)  # stands for the pre-training

    stream = StreamMerger(module, "magmax", scale=0.8)
    for task in tasks:
        stream.begin_task()  # before the optimizer is made
        train(fabric, module, task, labels, epochs=3)
        stream.end_task()

    print(f"{'':12} mirrored    noisy")
    show("fine-tuned", module, tasks, labels)
    with stream.merged_weights():
        show("merged", module, tasks, labels)
    stream.install()  # keeps the merged weights


def train(fabric: Fabric, module: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train on the first images, as anybody would."""
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN).split(32):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()


@torch.no_grad()
def show(what: str, module: nn.Module, tasks: list[Tensor], labels: Tensor) -> None:
    """Print the accuracy on the other images of each task."""
    right = [module(task[TRAIN:]).argmax(dim=1) == labels[TRAIN:] for task in tasks]
    print(f"{what:12}", " ".join(f"{100 * float(r.float().mean()):8.1f}" for r in right))


TRAIN = 1200

if __name__ == "__main__":
    main()
