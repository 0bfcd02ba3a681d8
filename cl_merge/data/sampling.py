"""Which training image comes when, and what its augmentation draws: no state, only seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from cl_merge.kernels.parallel import usable_cores
from cl_merge.seeds import derive_seed

# Processes that load images for one that trains: as many as the authors of MagMax have.
_MOST_WORKERS = 16

SIDE_BY_SIDE = "CL_MERGE_SIDE_BY_SIDE"
"""In the environment: how many runs share the cores of the machine; 1 if nothing is said."""

T = TypeVar("T")


class Draw(NamedTuple):
    """An image to load, with the seed of its augmentation.

    Attributes:
        index: Position in the data set.
        seed: What to seed the random generators with, 0 to 2^64 - 1.
    """

    index: int  # type: ignore[assignment]  # hides a method of tuples
    seed: int


class StreamSampler(DistributedSampler[Draw]):
    """Shuffle the images of a task, each with a seed for its augmentation.

    Order and seeds are functions of (seed, task, epoch, image) alone, whatever the workers and
    processes, and when a run resumes: batch k of W processes with b images each holds what batch k
    of one process with W * b images holds. If W does not divide the images, the first of the order
    come twice. Lightning tells it the epoch, as it is a `DistributedSampler`.

    Args:
        dataset: The images of the task.
        seed: Seed of the stream.
        task: Index of the task.
        num_replicas: Number of processes.
        rank: Which of them this is.

    Example:
        >>> sampler = StreamSampler([10, 20, 30], seed=0, task=0)
        >>> sorted(draw.index for draw in sampler)
        [0, 1, 2]
        >>> list(sampler) == list(sampler)
        True
    """

    def __init__(
        self, dataset: Dataset[Any], *, seed: int, task: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.task = task

    @override
    def __iter__(self) -> Iterator[Draw]:
        key = (self.seed, self.task, self.epoch)
        generator = torch.Generator().manual_seed(derive_seed("shuffle", *key))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        for index in islice(cycle(order), self.rank, self.total_size, self.num_replicas):
            yield Draw(index, derive_seed("augment", *key, index))


class StreamLoader(DataLoader[T]):
    """A data loader whose workers start when the first batch is asked for, not before.

    Lightning makes the first iterator of a fit before it has restored the epoch of a checkpoint:
    workers that started then would load what the sampler shows in epoch 0.
    """

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class ShareSampler(DistributedSampler[int]):
    """The images of one process, in order: over all processes each image once, none repeated."""

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    @override
    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's CPU generators back after a block."""
    # Lightning's `isolate_rng` does not where the block raises.
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators with a number from 0 to 2^64 - 1."""
    random.seed(seed)
    # NumPy and torch run the same generator on 32 bits of the seed: each gets a half of its
    # own, or a transform that draws from both would draw the same numbers twice.
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed)


def automatic_workers(trainer: L.Trainer | None) -> int:
    """How many processes load images if nobody says: on a GPU its share of the cores, up to 16.

    On a CPU none: it has work enough. What is loaded, and in which order, is the same with any.
    """
    on_gpu = trainer.strategy.root_device.type == "cuda" if trainer else torch.cuda.is_available()
    processes = trainer.num_devices if trainer else 1
    processes *= int(os.environ.get(SIDE_BY_SIDE, "1"))
    return min(usable_cores() // processes, _MOST_WORKERS) if on_gpu else 0
