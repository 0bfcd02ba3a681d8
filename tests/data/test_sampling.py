"""The order of training images and their augmentation: functions of seed, task, epoch and image."""

import inspect
import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny import QUIET, classifier, stream
from torch.utils.data import DistributedSampler

from cl_merge.data.images import ImageDataset
from cl_merge.data.sampling import Draw, StreamSampler, generators_kept, seed_generators
from cl_merge.seeds import derive_seed


def noise(image: Image.Image) -> torch.Tensor:
    """A number from each of the global generators, in a channel of its own."""
    drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
    return drawn[:, None, None].expand(3, 8, 8)


def augment(image: Image.Image) -> torch.Tensor:
    """The image with noise."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() + noise(image)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def sampler(count=24, **options) -> StreamSampler:
    return StreamSampler(range(count), **{"seed": 0, "task": 0} | options)


def batches(epoch=0, *, task=0, **options) -> list:
    """The batches of an epoch as they come."""
    data = stream(**{"train_transform": augment} | options)
    data.select(task)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def images(*where, **options) -> torch.Tensor:
    return torch.cat([batch.image for batch in batches(*where, **options)])


def as_set(batch) -> set[bytes]:
    return {image.numpy().tobytes() for image in batch}


@pytest.mark.parametrize("count", [24, 23, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_processes(count, world):
    alone = list(sampler(count))
    ranks = [list(sampler(count, num_replicas=world, rank=rank)) for rank in range(world)]
    assert {len(draws) for draws in ranks} == {-(-count // world)}
    padded = (alone * world)[: world * len(ranks[0])]
    for start in range(0, len(ranks[0]), 2):
        together = [draw for draws in ranks for draw in draws[start : start + 2]]
        assert sorted(together) == sorted(padded[world * start : world * (start + 2)])


def test_two_processes_transform_the_same_images_as_one():
    alone = batches(3, batch_size=8)
    ranks = []
    for rank in range(2):
        data = stream(train_transform=augment, batch_size=4)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        ranks.append(list(loader))
    assert len(alone) == len(ranks[0]) == 3
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert len(as_set(whole.image)) == 8
        assert as_set(whole.image) == as_set(torch.cat([part.image for part in parts]))


@pytest.mark.parametrize(("count", "world"), [(24, 2), (23, 4), (3, 8)])
def test_padding_is_that_of_torch(count, world):
    for rank in range(world):
        ours = sampler(count, num_replicas=world, rank=rank)
        theirs = DistributedSampler(range(count), world, rank, shuffle=False)
        order = [draw.index for draw in sampler(count)]
        assert [draw.index for draw in ours] == [order[place] for place in theirs]
        assert len(ours) == len(theirs) == len(list(ours))


def test_one_process_sees_every_image_once_an_epoch():
    for epoch in range(3):
        shuffled = sampler()
        shuffled.set_epoch(epoch)
        order = [draw.index for draw in shuffled]
        assert sorted(order) == list(range(24))
        assert order != list(range(24))


def test_the_same_epoch_again_is_the_same():
    again = sampler()
    first = list(again)
    assert list(again) == first
    again.set_epoch(1)
    assert list(again) != first
    again.set_epoch(0)
    assert list(again) == first


@pytest.mark.parametrize("other", [{"seed": 1}, {"task": 1}, {"epoch": 1}])
def test_seed_task_and_epoch_change_the_order_and_every_augmentation(other):
    def draws(epoch=0, **options):
        shuffled = sampler(**options)
        shuffled.set_epoch(epoch)
        return list(shuffled)

    first, second = draws(), draws(**other)
    assert [draw.index for draw in first] != [draw.index for draw in second]
    assert len({draw.seed for draw in first + second}) == 48


def test_the_stream_passes_seed_task_and_epoch_on():
    def drawn(*where, **options):
        return as_set(images(*where, train_transform=noise, **options))

    first = drawn()
    assert len(first) == 24
    assert drawn() == first
    for other in (drawn(1), drawn(task=1), drawn(seed=1)):
        assert not other & first


def test_workers_change_nothing():
    L.seed_everything(1, verbose=False)
    alone = images(2, num_workers=0)
    torch.rand(3)
    assert torch.equal(images(2, num_workers=2), alone)


def test_iterating_leaves_the_global_generators_alone():
    before = states()
    images()
    assert states() == before


def test_the_three_generators_draw_apart_from_each_other():
    """All three are the Mersenne twister: the same seed could give the same bits."""

    def low_bits(seed):
        with generators_kept():
            seed_generators(seed)
            drawn = random.getrandbits(32), int(np.random.randint(1 << 32, dtype=np.uint32))
            return [bits % (1 << 24) for bits in drawn] + [int(torch.rand(()) * (1 << 24))]

    seeds = [derive_seed(number) for number in range(20)]
    assert len({bits for seed in seeds for bits in low_bits(seed)}) == 3 * len(seeds)
    assert [low_bits(seed) for seed in seeds] == [low_bits(seed) for seed in seeds]
    assert low_bits((1 << 64) - 1) != low_bits(0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_transform_that_raises_leaves_the_generators_as_they_were(error):
    def fail(image):
        augment(image)
        raise error

    data = stream(train_transform=fail).train_dataloader().dataset
    before = states()
    with pytest.raises(error):
        data[Draw(0, 5)]
    assert states() == before


def test_an_image_asked_for_by_number_draws_from_the_global_generators():
    data: ImageDataset = stream(train_transform=augment).train_dataloader().dataset
    L.seed_everything(1, verbose=False)
    first = data[0].image
    assert not torch.equal(data[0].image, first)
    L.seed_everything(1, verbose=False)
    assert torch.equal(data[0].image, first)
    assert torch.equal(data[Draw(0, 5)].image, data[Draw(0, 5)].image)


class Record(L.Callback):
    """Keeps the images of every epoch."""

    def __init__(self):
        self.epochs = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.epochs.setdefault(trainer.current_epoch, []).append(batch.image.clone())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_a_resumed_run_sees_what_the_whole_one_saw(tmp_path, workers):
    def fit(epochs, resume=None):
        record, saved = Record(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        options = QUIET | {"enable_checkpointing": True, "callbacks": [record, saved]}
        data = stream(train_transform=augment, num_workers=workers)
        trainer = L.Trainer(**options, max_epochs=epochs)
        # Checkpoints hold classes of this package; older versions of lightning read those unasked.
        asks = "weights_only" in inspect.signature(trainer.fit).parameters
        safety = {"weights_only": False} if asks else {}
        trainer.fit(classifier(), datamodule=data, ckpt_path=resume, **safety)
        return {epoch: torch.cat(batches) for epoch, batches in record.epochs.items()}

    whole = fit(3)
    assert list(whole) == [0, 1, 2]
    assert not as_set(whole[0]) & as_set(whole[1])
    resumed = fit(3, tmp_path / "epoch=0.ckpt")
    assert list(resumed) == [1, 2]
    assert all(torch.equal(resumed[epoch], whole[epoch]) for epoch in resumed)


def test_workers_start_with_the_first_batch_and_see_the_epoch_set_until_then():
    data = stream(train_transform=augment, num_workers=1)
    loader = data.train_dataloader()
    begun = iter(loader)
    loader.sampler.set_epoch(4)
    assert torch.equal(torch.cat([batch.image for batch in begun]), images(4))


def test_lightning_may_still_replace_the_sampler():
    record = Record()
    options = QUIET | {"max_epochs": 2, "overfit_batches": 1, "callbacks": [record]}
    L.Trainer(**options).fit(classifier(), datamodule=stream())
    assert torch.equal(record.epochs[0][0], record.epochs[1][0])
