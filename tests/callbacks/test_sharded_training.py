"""Streams whose parameters are sharded by Lightning's strategy, on two processes over gloo."""

import lightning as L
import pytest
import torch
from forked import as_ranks, fsdp2_needs_gpu
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from tiny import QUIET
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from cl_merge import EWC, ClassStatistics, LwF, MergeCallback, merge_checkpoints
from cl_merge.callbacks import AutoScale
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import parameters_of
from cl_merge.task_vectors.shards import whole

pytestmark = [pytest.mark.slow, fsdp2_needs_gpu]

TASKS = 3


class Sharded(L.LightningModule):
    """A module of a user's that shards itself once, as Lightning's pages show it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4))
        self.seen, self.sharded = [], False

    def configure_model(self):
        if not self.sharded:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.sharded = True

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, index):
        self(batch[0])

    def on_test_batch_start(self, batch, index):
        self.seen.append(weights(self))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def weights(module):
    return {name: whole(p.detach()).clone() for name, p in parameters_of(module).items()}


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def loader(task):
    generator = torch.Generator().manual_seed(task)
    images, labels = torch.randn(32, 8, generator=generator), torch.arange(32) % 4
    return DataLoader(TensorDataset(images, labels), 8)


def trainer(*callbacks, **settings):
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    where = {"accelerator": "cpu", "devices": 2, "strategy": strategy}
    settings = {"max_epochs": 1} | settings
    return L.Trainer(**QUIET | where | settings, callbacks=list(callbacks))


def test_a_stream_is_merged_as_its_files_are(tmp_path):
    def work(rank):
        module = Sharded()
        merge = MergeCallback(directory=tmp_path / "tasks", buffers="average")
        if rank == 0:
            save_file(weights(module), tmp_path / "base.safetensors")
        for task in range(TASKS):
            trainer(merge).fit(module, loader(task))
            trained = weights(module)
            trainer(merge).test(module, loader(task), verbose=False)
            assert equal(weights(module), trained)
            if rank == 0:
                files = [tmp_path / f"tasks/task{i}.safetensors" for i in range(task + 1)]
                merge_checkpoints(
                    tmp_path / "base.safetensors",
                    files,
                    tmp_path / "merged.safetensors",
                    overwrite=True,
                )
                assert equal(module.seen[-1], load_file(tmp_path / "merged.safetensors"))
        kept = sum(base.numel() for base in merge.base.values())
        every = sum(parameter.numel() for parameter in parameters_of(module).values())
        assert kept <= every / 2 + len(merge.base)  # a shard, but for rounding

    as_ranks(work, 2)


def test_a_checkpoint_within_a_task_goes_on_to_the_same_merge(tmp_path):
    def work(rank):
        module, merge = (
            Sharded(),
            MergeCallback("random-mix", buffers="trained", directory=tmp_path / "tasks"),
        )
        trainer(merge).fit(module, loader(0))
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "within", every_n_epochs=1, save_top_k=-1, enable_version_counter=False
        )
        steps = {"max_epochs": 2, "enable_checkpointing": True}
        trainer(merge, checkpoint, **steps, limit_train_batches=1).fit(module, loader(1))
        trainer(merge).test(module, loader(1), verbose=False)
        expected = module.seen[-1]

        path = tmp_path / "within.ckpt"
        other, resumed = Sharded(), MergeCallback("random-mix", buffers="trained")
        rest = {"max_epochs": 2, "limit_train_batches": 1}
        trainer(resumed, **rest).fit(other, loader(1), ckpt_path=path)
        assert resumed.tasks == 2
        trainer(resumed).test(other, loader(1), verbose=False)
        assert equal(other.seen[-1], expected)

        # An evaluation of the checkpoint counts what it holds as its task, and leaves the rest.
        fresh = Sharded()
        knows = MergeCallback("random-mix", buffers="trained")
        trainer(knows).test(fresh, loader(1), verbose=False, ckpt_path=path)
        assert equal(fresh.seen[-1], expected)

    as_ranks(work, 2)


def test_the_scale_is_chosen_on_the_merged_model_and_not_on_gathered_leftovers():
    def work(rank):
        module, seen = Sharded(), []

        def logits(module, batch):
            seen.append(whole(module.net[2].weight).detach().clone())
            return module(batch[0]), batch[1]

        scale = AutoScale(logits=logits)
        merge = MergeCallback(scale=scale, buffers="base", held_out=lambda: loader(5))
        trainer(merge).fit(module, loader(0))
        trained = weights(module)
        assert any(not torch.equal(seen[0], other) for other in seen)
        trainer(merge).test(module, loader(0), verbose=False)
        assert equal(weights(module), trained)

    as_ranks(work, 2)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: EWC(), "EWC needs whole parameters on every rank"),
        (lambda: LwF(target="net"), "LwF needs whole parameters on every rank"),
        (lambda: ClassStatistics(), "ClassStatistics needs whole parameters on every rank"),
        (lambda: MergeCallback("fisher"), "'fisher' needs gradients of single samples"),
        (lambda: MergeCallback(weights="best"), "reads a checkpoint in one file"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(callback, message):
    def work(rank):
        module = Sharded()
        with pytest.raises((RuntimeError, InputError), match=message):
            trainer(callback()).fit(module, loader(0))

    as_ranks(work, 2)


def test_what_one_process_cannot_merge_none_does():
    def work(rank):
        module, merge = Sharded(), MergeCallback()

        class Breaks(L.Callback):
            def on_train_end(self, trainer, module):
                with torch.no_grad():
                    held = module.net[0].weight.to_local()
                    held[0, 0] = float("nan") if rank else held[0, 0]

        with pytest.raises(InputError, match=r"task 0 .*net.0.weight"):
            trainer(merge, Breaks()).fit(module, loader(0))
        assert merge.tasks == 0

    as_ranks(work, 2)
