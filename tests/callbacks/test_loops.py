"""What each callback does with what loops have: the table of docs/reference/loops.md.

    python tests/callbacks/test_loops.py

prints the table's rows, for the page.
"""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from forked import fsdp2_needs_gpu
from growing import Backbone, Endless, Heads, Single, grow
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from plain import Plain, loader, trainer
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from cl_merge.callbacks import EWC, ClassStatistics, DriftPenalty, LwF, MergeCallback

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/reference/loops.md"


def features(module, batch):
    images, labels = batch.values() if isinstance(batch, dict) else batch
    if isinstance(module, Backbone):
        return module.backbone(images), labels
    return getattr(module.net, "_orig_mod", module.net)[:2](images), labels


CALLBACKS = {
    "MergeCallback": MergeCallback,
    "LwF": lambda: LwF(target="net"),
    "EWC": EWC,
    "DriftPenalty": lambda: DriftPenalty(features=lambda *given: features(*given)[0]),
    "ClassStatistics": lambda: ClassStatistics("base", features=features, classes=3),
}


def two_tasks(callback, module, between=lambda module: None, **options):
    trainer(callback, **options).fit(module, loader(0))
    between(module)
    trainer(callback, **options).fit(module, loader(1))


def unfrozen_within_a_task(callback):
    for task in range(2):
        unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        module = Backbone()
        if task == 0:
            trainer(unfreeze, callback, max_epochs=2).fit(module, loader(task))
            kept = module
        else:
            trainer(callback).fit(kept, loader(task))


def other_precision(callback):
    module = Plain()
    trainer(callback).fit(module, loader(0))
    trainer(callback, precision="bf16-true").fit(module, loader(1))


def averaged_behind(callback):
    module = Plain()
    for task in range(2):
        average = StochasticWeightAveraging(0.1, 1)
        trainer(callback, average, max_epochs=3).fit(module, loader(task))


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Named(Plain):
    """Batches by name."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["images"], batch["labels"]), batch_idx)


class ByName(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        images, labels = loader(0).dataset[index]
        return {"images": images, "labels": labels}


class Switching(Plain):
    def on_train_end(self):
        self.net[0].weight.data.mul_(0.5)


class Strict(Plain):
    def state_dict(self):
        return super().state_dict()


def by_name(callback):
    module = Named()
    for _ in range(2):
        trainer(callback).fit(module, torch.utils.data.DataLoader(ByName(), batch_size=8))


def endless(callback):
    module, data = Plain(), torch.utils.data.DataLoader(Endless(), batch_size=4)
    for _ in range(2):
        trainer(callback, max_epochs=-1, max_steps=3).fit(module, data)


def compiled_part(module):
    module.net = torch.compile(module.net, backend="eager")


def flattened(callback):
    callback.setup(type("Trainer", (), {"strategy": FSDPStrategy()})(), Plain(), "fit")


class Shardable(Plain):
    def configure_model(self):
        if not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def sharded(callback):
    """On one process; test_sharded_training.py has two."""
    module, where = Shardable(), {"accelerator": "cpu", "devices": 1}
    try:
        for task in range(2):
            strategy = ModelParallelStrategy(1, 1, process_group_backend="gloo")
            trainer(callback, strategy=strategy, **where).fit(module, loader(task))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def spawned(callback):
    loop = trainer(callback, strategy="ddp_spawn", devices=2, accelerator="cpu")
    callback.setup(loop, Plain(), "fit")


LOOPS = {
    "a head that grows by rows": lambda c: two_tasks(c, Plain(), lambda m: grow(m, 5)),
    "a new head for each task": lambda c: two_tasks(c, Heads(), Heads.add),
    "layers that are unfrozen within a task": unfrozen_within_a_task,
    "a layer that is frozen from the second task on": lambda c: two_tasks(
        c, Plain(), lambda m: m.net[0].requires_grad_(False)
    ),
    "a part that is compiled between tasks": lambda c: two_tasks(c, Plain(), compiled_part),
    "a module that is compiled whole": lambda c: two_tasks(
        c, torch.compile(Plain(), backend="eager")
    ),
    "bf16-true from the second task on": other_precision,
    "manual optimisation": lambda c: two_tasks(c, Manual()),
    "accumulation, bf16-mixed": lambda c: two_tasks(
        c, Plain(), accumulate_grad_batches=2, precision="bf16-mixed"
    ),
    "batches by name": by_name,
    "one output, trained with MSE": lambda c: two_tasks(c, Single("mse")),
    "a loader without an end, and max_steps": endless,
    "StochasticWeightAveraging behind": averaged_behind,
    "a module that switches weights when training ends": lambda c: two_tasks(c, Switching()),
    "a state_dict without arguments": lambda c: two_tasks(c, Strict()),
    "strategy='ddp_spawn'": spawned,
    "strategy='fsdp'": flattened,
    "ModelParallelStrategy with fully_shard": sharded,
}


def outcome(loop, callback):
    """What the page says: that it works, or how it is refused."""
    try:
        LOOPS[loop](callback)
    except (RuntimeError, ValueError) as error:
        assert callback.tasks in (0, 1)
        words = str(error).replace("|", "/")
        return f"refused: {words if len(words) < 60 else words[:60].rsplit(' ', 1)[0] + ' …'}"
    assert callback.tasks == 2
    return "works"


def row(loop):
    return f"| {loop} | {' | '.join(outcome(loop, make()) for make in CALLBACKS.values())} |"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "loop",
    [
        pytest.param(name, marks=fsdp2_needs_gpu if run is sharded else ())
        for name, run in LOOPS.items()
    ],
)
def test_the_page_says_what_each_callback_does_in_a_loop(loop):
    assert row(loop) in PAGE.read_text()


if __name__ == "__main__":
    for loop in LOOPS:
        print(row(loop))  # noqa: T201
