"""The task stream: a LightningDataModule that shows one task at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset
from torchvision.transforms.functional import to_tensor
from typing_extensions import override

from cl_merge.data.images import ImageDataset, ImageTable, Sample, Transform
from cl_merge.data.kept_images import KeptImages, keep_images
from cl_merge.data.sampling import ShareSampler, StreamLoader, StreamSampler, automatic_workers
from cl_merge.data.sources import read_images
from cl_merge.data.tables import (
    indices_of,
    parts_of,
    splits_read,
    two_splits,
    with_domains,
    with_unions,
)
from cl_merge.data.tasks import (
    SCENARIOS,
    Indices,
    Order,
    Task,
    as_integer,
    held_out_tasks,
    joint_task,
    limited_tasks,
    split_by_class,
    split_by_data,
    split_by_domain,
    split_by_source,
)
from cl_merge.data.unreadable import UNREADABLE, without_unreadable
from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.seeds import derive_seed

if TYPE_CHECKING:
    import datasets


# Decoded training images are kept in memory up to this many bytes, unless the user says otherwise.
CACHE_BYTES = 1 << 30


class TaskStream(L.LightningDataModule):
    """Split a labelled image data set into tasks and show them one after another.

    The training loader holds the images of the current task only, the test loader those of every
    task. Labels stay global: they are the classes of the whole data set whatever the task. Batches
    are `Sample` tuples ``(image, label, task)``.

    The order of the training images and what their augmentation draws depend on seed, task, epoch
    and image only: not on workers, processes or whether a run was resumed.

    Args:
        data: A folder, parquet file or hub id (see `read_images`), or the splits themselves as a
            mapping to `datasets.Dataset`.
        tasks: Number of tasks. Where each domain or data set is a task, the data decides, and this
            must be None or their number.
        scenario: ``"class"`` (tasks of disjoint classes), ``"domain"`` (a task per domain, with all
            classes), ``"source"`` (a task per data set of several joined ones, with the classes of
            that data set) or ``"data"`` (random parts of the images).
        order: Order of the classes, the domains or the data sets: ``"natural"``, a seed, or a list
            of indices or names. `Task.class_names` says which it was.
        image: The column with the images.
        label: The column with the labels.
        domain: The column with the domains, or with the names of the data sets that were joined;
            needed in the domain and source scenarios only.
        domain_pattern: A regular expression that reads the domain off the name of an image's file
            where no column has it, see `with_domains`.
        train_split: Name of the split to train on; ``"train+validation"`` for several as one.
        test_split: Name of the split to test on.
        test_fraction: Share of the training split to hold out as test images where the data set has
            no test split.
        split_seed: Draws that share; None for `seed`.
        revision: Which commit of a hub data set.
        images_per_class: Train on at most so many images of each class.
        held_out: Share of the training images of each class and task not to train on, at least one
            where there are two: what `held_out_dataloader` shows.
        train_transform: Turns a PIL image into a float tensor [3, H, W] for training.
        test_transform: The same for testing; draws no random numbers.
        batch_size: Images per batch and process.
        num_workers: Processes that load images; None for a GPU's share of the cores, up to 16, and
            none on a CPU.
        cache: Keep decoded training images in memory, and test images at the size of the model in a
            temporary file: True, False, or ``"auto"`` for training images of less than a gibibyte,
            and test images that take at most a quarter of the free disk.
        unreadable: ``"skip"`` looks at every image before anything trains, and leaves out and names
            what cannot be read; with ``"stop"`` the first one that is met raises `InputError`.
        sampler: Makes the sampler of a training loader from its data set; if None, `StreamSampler`,
            which shuffles. With any other, augmentation draws from the global generators.
        seed: For everything drawn here.

    Attributes:
        tasks: All tasks, in order.
        test_tasks: The tasks that test images count for: `tasks`, or in a joint stream those
            joined.
        class_names: The names of all classes; the index is the global label.
        images_read: How many images the splits ``train`` and ``test`` have, whatever tasks use.

    Raises:
        InputError: If a column or split is missing, labels lie outside the head, there are more
            tasks than classes, a task has no training or test image, or another argument cannot be.

    Example::

        clip = load_clip("glyph")
        stream = TaskStream("/photos", tasks=10, train_transform=clip.train_transform,
                            test_transform=clip.test_transform)
        for task in stream.tasks:
            stream.select(task.index)
            L.Trainer(max_epochs=3).fit(model, datamodule=stream)
    """

    def __init__(
        self,
        data: str | Path | Mapping[str, datasets.Dataset],
        *,
        tasks: int | None = None,
        scenario: str = "class",
        order: Order = "natural",
        image: str = "image",
        label: str = "label",
        domain: str | None = None,
        domain_pattern: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        test_fraction: float | None = None,
        split_seed: int | None = None,
        revision: str | None = None,
        images_per_class: int | None = None,
        held_out: float = 0.0,
        train_transform: Transform = to_tensor,
        test_transform: Transform = to_tensor,
        batch_size: int = 128,
        num_workers: int | None = 0,
        cache: bool | Literal["auto"] = "auto",
        unreadable: Literal["stop", "skip"] = "stop",
        sampler: Callable[[ImageDataset], Sampler[int]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if scenario not in SCENARIOS:
            raise unknown_name("scenario", scenario, SCENARIOS)
        check_loading(batch_size, num_workers, cache)
        if unreadable not in UNREADABLE:
            raise unknown_name("value of unreadable", unreadable, UNREADABLE)
        if not isinstance(data, (str, Path, Mapping)):
            raise InputError(
                f"data is of type {type(data).__name__}; expected a folder, a parquet file, a hub "
                "id, or data sets by split, as in {'train': ..., 'test': ...}"
            )
        wanted = splits_read(train_split, test_split, test_fraction)
        if not isinstance(data, Mapping):
            data = read_images(data, revision=revision, splits=parts_of(wanted))
        splits = with_unions(data, wanted)
        if domain is None and domain_pattern is not None:
            used = {train_split, test_split} & set(splits)
            read = {name: with_domains(splits[name], image, domain_pattern) for name in used}
            splits, domain = dict(splits) | read, "domain"
        if domain is None and scenario in ("domain", "source"):
            raise InputError(f"scenario={scenario} needs the column of the domains: domain=...")
        chosen = seed if split_seed is None else split_seed
        train, test = two_splits(splits, train_split, test_split, test_fraction, chosen)
        self._train = ImageTable(train, image, label, domain, where=train_split)
        self._test = ImageTable(test, image, label, domain, where=test_split)
        self.images_read = {"train": len(train), "test": len(test)}
        self._train_labels, self._test_labels, self.class_names = indices_of(
            self._train, self._test, "label"
        )
        self._train_transform = train_transform
        self._test_transform = test_transform
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._cache = cache
        self._sampler = sampler
        self._seed = seed
        self.tasks = self._split(scenario, tasks, order)
        if images_per_class is not None:
            self.tasks = limited_tasks(self.tasks, self._train_labels, images_per_class, seed)
        if held_out != 0:
            self.tasks = held_out_tasks(self.tasks, self._train_labels, held_out, seed)
        if unreadable == "skip":
            tables = self._train, self._test
            self.tasks = without_unreadable(self.tasks, *tables, self._workers)
        self.test_tasks = self.tasks
        self._current = 0
        self._test_samples: ImageDataset | KeptImages | None = None
        # By task; a joint stream has its own.
        self._held_out: dict[int, ImageDataset | KeptImages] = {}

    @property
    def task(self) -> Task:
        """The task that the training loader shows."""
        return self.tasks[self._current]

    @property
    def row(self) -> int:
        """The row of the accuracy matrix after the current task; after joint training the last."""
        return self._current + len(self.test_tasks) - len(self.tasks)

    def joint(self) -> TaskStream:
        """A stream of the single task ``"joint"``, for training that sees everything at once.

        Test images still count for the task that they came from, so that the accuracy matrix has as
        many columns as ever, and its last row alone.

        Example::

            fit_stream(model, stream.joint(), trainer={"max_epochs": 3})
        """
        joint = copy.copy(self)
        joint._current = 0
        joint._held_out = {}
        joint.tasks = [joint_task(self.tasks, self.class_names)]
        return joint

    def select(self, index: int) -> Task:
        """Point at the task of an index, from 0, and return it; `InputError` if there is none."""
        if not 0 <= index < len(self.tasks):
            raise InputError(f"no task {index}: the stream has tasks 0 to {len(self.tasks) - 1}")
        self._current = index
        return self.task

    @override
    def train_dataloader(self) -> DataLoader[Sample]:
        """Load the images of the current task, shuffled anew in every epoch.

        Lightning tells the sampler the epoch; in a loop of your own, call
        ``loader.sampler.set_epoch(epoch)``.
        """
        dataset = self._images_of(self.task, self._train_transform)
        task, (rank, world) = self.task.index, self._rank_and_world()
        sampler: Sampler[Any] = (
            StreamSampler(dataset, seed=self._seed, task=task, num_replicas=world, rank=rank)
            if self._sampler is None
            else self._sampler(dataset)
        )
        return StreamLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            # For the seeds of workers: the task's own, so that what came before changes nothing.
            generator=torch.Generator().manual_seed(derive_seed("workers", self._seed, task)),
        )

    @override
    def test_dataloader(self) -> DataLoader[Sample]:
        """Load the test images of every task, each exactly once over all processes."""
        if self._test_samples is None:
            tasks = np.full(len(self._test), -1)
            for task in self.test_tasks:
                tasks[task.test] = task.index
            rows = np.flatnonzero(tasks >= 0)
            transform = self._test_transform
            dataset = ImageDataset(self._test, rows, self._test_labels, tasks, transform)
            self._test_samples = self._kept(dataset)
        return self._ordered_loader(self._test_samples)

    def held_out_dataloader(self) -> DataLoader[Sample]:
        """Load the held-out training images of all tasks up to the current one, as if for a test.

        They were never trained on, and are no test images: what is chosen on them, such as the
        scale of a merge, leaves the test untouched. Each is shown exactly once over all processes,
        in a fixed order.

        Raises:
            InputError: If no image is held out.
        """
        seen = self.tasks[: self._current + 1]
        if not any(len(task.held_out) for task in seen):
            raise InputError(
                "no training image is held out: give a share of each task's training images, such "
                "as held_out=0.1"
            )
        for task in seen:
            if task.index not in self._held_out:
                dataset = self._dataset(task.held_out, task, self._test_transform)
                self._held_out[task.index] = self._kept(dataset)
        return self._ordered_loader(ConcatDataset([self._held_out[t.index] for t in seen]))

    def task_dataloader(self) -> DataLoader[Sample]:
        """Load the current task's training images as if for a test, for what is measured on them.

        Each is shown exactly once over all processes, in a fixed order.
        """
        return self._ordered_loader(self._images_of(self.task, self._test_transform))

    def sample_dataloader(self, images: int) -> DataLoader[Sample]:
        """Load at most so many of the current task's training images, evenly spread over them.

        As if for a test, each exactly once over all processes, in a fixed order.
        """
        every = self._images_of(self.task, self._test_transform)
        count = min(images, len(every))
        spread = [index * len(every) // count for index in range(count)]
        return self._ordered_loader(Subset(every, spread))

    predict_dataloader = test_dataloader

    @override
    def state_dict(self) -> dict[str, Any]:
        """Which task is current."""
        return {"task": self._current}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Point at the task of a checkpoint."""
        self.select(state_dict["task"])

    def _split(self, scenario: str, tasks: int | None, order: Order) -> list[Task]:
        if tasks is not None and (as_integer(tasks) or 0) < 1:
            raise InputError(f"tasks={tasks}; expected a whole number from 1")
        labels, names = (self._train_labels, self._test_labels), self.class_names
        if scenario == "class":
            return split_by_class(*labels, names, tasks=tasks or 5, order=order)
        if scenario == "data":
            sizes = len(self._train), len(self._test)
            return split_by_data(*sizes, names, tasks=tasks or 5, seed=self._seed)
        train, test, domain_names = indices_of(self._train, self._test, "domain")
        if tasks not in (None, len(domain_names)):
            raise InputError(
                f"tasks={tasks}, but the data set has {len(domain_names)} {scenario}s "
                f"({listing(domain_names)}), and each is a task; leave it out"
            )
        if scenario == "domain":
            return split_by_domain(train, test, names, domain_names, order=order)
        return split_by_source((train, test), labels, names, domain_names, order=order)

    def _ordered_loader(self, samples: Dataset[Sample]) -> DataLoader[Sample]:
        """Load in a fixed order this process's share; `Trainer` would repeat images to pad it."""
        rank, world = self._rank_and_world()
        parts = samples.datasets if isinstance(samples, ConcatDataset) else [samples]
        kept = sum(part.kept for part in parts if isinstance(part, KeptImages))
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=ShareSampler(samples, world, rank) if world > 1 else None,
            # To read what is kept takes less than to hand it from one process to another.
            num_workers=0 if kept >= len(samples) // world else self._workers,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: to make an iterator draws a number, and that must not come
            # from the global generator, or an evaluation would change the training after it.
            generator=torch.Generator().manual_seed(self._seed),
        )

    @property
    def _workers(self) -> int:
        return automatic_workers(self.trainer) if self.num_workers is None else self.num_workers

    def _rank_and_world(self) -> tuple[int, int]:
        """This process's rank, and how many processes there are."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def _images_of(self, task: Task, transform: Transform) -> ImageDataset:
        """A task's training images, decoded once if those of all tasks fit in memory."""
        images = sum(len(task.train) for task in self.tasks)
        if self._cache is True:
            self._train.keep_decoded(task.train, math.inf)
        elif self._cache == "auto" and self._train.decoded_bytes(images) <= CACHE_BYTES:
            self._train.keep_decoded(task.train, CACHE_BYTES)
        return self._dataset(task.train, task, transform)

    def _dataset(self, rows: Indices, task: Task, transform: Transform) -> ImageDataset:
        tasks = np.broadcast_to(np.int64(task.index), len(self._train))  # takes no memory
        return ImageDataset(self._train, rows, self._train_labels, tasks, transform)

    def _kept(self, dataset: ImageDataset) -> ImageDataset | KeptImages:
        """Transform the images once, if there is room for them."""
        if not self._cache or not len(dataset):
            return dataset
        return keep_images(dataset, self._rank_and_world()[1] if self._cache == "auto" else None)


def check_loading(batch_size: int, num_workers: int | None, cache: Any) -> None:
    """Check how images are loaded, which would otherwise show when the first loader is made."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected 1 or more")
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers={num_workers}; expected 0 or more")
    if not (isinstance(cache, bool) or cache == "auto"):
        raise InputError(f"cache={cache}; expected true, false or auto")
