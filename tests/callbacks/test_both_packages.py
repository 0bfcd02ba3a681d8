"""The callbacks under ``import pytorch_lightning as pl``, whose classes are others."""

import pytest
import torch
from plain import loader, same, weights
from torch import nn

from cl_merge import TaskVector
from cl_merge.callbacks import EWC, DriftPenalty, LwF, MergeCallback
from cl_merge.errors import InputError

pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

pytestmark = pytest.mark.slow


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.seen = {}

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen["validation"] = weights(self)

    def test_step(self, batch, batch_idx):
        self.seen["test"] = weights(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def trainer(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **quiet | options)


def test_a_stream_is_merged_and_evaluated():
    held = DriftPenalty(features=lambda module, batch: module(batch[0]))
    module, every = Module(), [LwF(target="net"), EWC(), held, MergeCallback("magmax")]
    merge, base = every[-1], weights(module)
    for task in range(2):
        loop = trainer(*every, num_sanity_val_steps=1)
        loop.fit(module, loader(task), loader(task))
        assert same(module.seen["validation"], weights(module))
    trained = weights(module)
    trainer(merge).test(module, loader(0), verbose=False)
    assert same(module.seen["test"], merge.merged().apply_to(base, 0.5))
    assert same(weights(module), trained)
    assert [callback.tasks for callback in every] == [2, 2, 2, 2]


def test_an_average_counts_once():
    module, merge = Module(), MergeCallback("magmax")
    base = weights(module)
    average = pl.callbacks.StochasticWeightAveraging(0.1, 1)
    trainer(merge, average, max_epochs=3).fit(module, loader(0))
    assert merge.merged() == TaskVector.between(base, weights(module))
    with pytest.raises(InputError, match="^this StochasticWeightAveraging has been through the"):
        trainer(merge, average, max_epochs=3).fit(module, loader(1))


@pytest.mark.skipif(
    not hasattr(pl.callbacks, "WeightAveraging"), reason="this version has no WeightAveraging"
)
def test_an_average_that_validates_is_named():
    module, merge = Module(), MergeCallback("magmax")
    average = pl.callbacks.WeightAveraging()
    trainer(merge, average).fit(module, loader(0), loader(0))
    before = weights(module)
    with pytest.raises(InputError, match=r"WeightAveraging can do that; "):
        trainer(merge, average).validate(module, loader(0), verbose=False)
    assert same(weights(module), before)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "fsdp"])
def test_strategies_under_which_it_cannot_work_are_refused(strategy):
    if strategy == "fsdp":
        loop = type("Trainer", (), {"strategy": pl.strategies.FSDPStrategy()})()
    else:
        loop = trainer(strategy=strategy, devices=2)
    with pytest.raises(RuntimeError, match="^MergeCallback (cannot work with|keeps its state)"):
        MergeCallback("magmax").setup(loop, Module(), "fit")
