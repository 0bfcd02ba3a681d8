"""Images that are transformed once and kept in a file, for all evaluations of a run."""

from __future__ import annotations

import copy
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import normalize, to_tensor

from cl_merge.data.images import ImageDataset, Sample, Transform
from cl_merge.errors import InputError

# Unless the user says otherwise, at most this part of what is free where temporary files lie.
_SHARE_OF_DISK = 0.25


@dataclass(frozen=True)
class _Layout:
    """What is kept of an image, and what makes the transformed image of it."""

    transform: Transform  # up to what is kept
    finish: Callable[[Tensor], Tensor]  # of a batch, from then on
    shape: tuple[int, ...]  # of all images
    dtype: np.dtype[Any]

    @property
    def values(self) -> int:
        """Bytes of all images."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes of the file: behind the images, one for each that says whether it is there."""
        return self.values + self.shape[0]


class KeptImages(Dataset[Sample]):
    """The samples of a data set, each transformed when it is first asked for and then kept.

    Where the transform is a `torchvision.transforms.Compose` that turns pictures into tensors and
    then at most normalizes them, what is kept are the 8-bit pixels at the size that the model sees,
    a quarter of the transformed image; otherwise the transformed image. The bits are the same. They
    lie in a temporary file without a name, which ends with the process, and which workers share:
    what one decodes, all others read.

    Args:
        dataset: At least one image; its transform draws no random numbers.
        layout: Of its file.
    """

    def __init__(self, dataset: ImageDataset, layout: _Layout) -> None:
        self._source, self._layout = copy.copy(dataset), layout
        self._source.transform = layout.transform
        self._map(_new_file(layout.size))

    @property
    def kept(self) -> int:
        """How many images are kept so far, of this process and its workers."""
        return int(self._is_kept.sum())

    def __len__(self) -> int:
        return self._layout.shape[0]

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Load the samples of a batch at once, as a data loader asks for them."""
        for index in indices:
            if not self._is_kept[index]:
                self._keep(index)
        images = self._layout.finish(torch.from_numpy(self._values[list(indices)]))
        return [
            Sample(image, *self._source.label_and_task(index))
            for image, index in zip(images, indices, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_values": None, "_is_kept": None, "_file": None}
        # A worker that is started anew gets the same file, but on Windows; a copy for another use
        # has its own.
        if get_spawning_popen() is not None and hasattr(reduction, "DupFd"):
            state["_file"] = reduction.DupFd(self._file.fileno())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        shared = state["_file"]
        self._map(os.fdopen(shared.detach(), "r+b") if shared else _new_file(self._layout.size))

    def _map(self, file: IO[bytes]) -> None:
        layout, memory = self._layout, mmap.mmap(file.fileno(), self._layout.size)
        self._file = file
        flat = np.frombuffer(memory, layout.dtype, int(np.prod(layout.shape)))
        self._values = flat.reshape(layout.shape)
        self._is_kept = np.frombuffer(memory, bool, len(self), offset=layout.values)

    def _keep(self, index: int) -> None:
        image, shape = np.asarray(self._source[index].image), self._layout.shape[1:]
        if image.shape != shape:
            raise InputError(
                f"test_transform makes shape {image.shape} of image {index}, and {shape} of the "
                "first one; expected one size for all, as after Resize and CenterCrop"
            )
        self._values[index] = image
        self._is_kept[index] = True


def keep_images(dataset: ImageDataset, processes: int | None = None) -> KeptImages | ImageDataset:
    """Keep what a data set gives, if there is room; images in bfloat16 are not kept.

    Args:
        dataset: Its transform draws no random numbers.
        processes: How many do the same on this disk; the data set comes back as it is if all of
            them would take more than a quarter of what is free, or the disk refuses. None takes
            whatever it needs.

    Raises:
        InputError: If the disk has not enough room.
    """
    layout = _layout_of(dataset)
    if layout is None:
        return dataset
    try:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if processes is not None and processes * layout.size > _SHARE_OF_DISK * free:
            return dataset
        return KeptImages(dataset, layout)
    except OSError as error:
        if processes is not None:  # a quota, which the free disk does not show
            return dataset
        raise InputError(
            f"cache=True: '{tempfile.gettempdir()}' has no room for "
            f"{layout.size / 2**30:.1f} GiB of images ({error.strerror}); set TMPDIR to another "
            "folder, or cache=False"
        ) from error


def _layout_of(dataset: ImageDataset) -> _Layout | None:
    picture = dataset.picture(0)
    to_pixels, finish = _parts(dataset.transform, picture)
    transform = to_pixels or dataset.transform
    image = transform(picture)
    if isinstance(image, Tensor) and image.dtype == torch.bfloat16:  # which numpy does not have
        return None
    first = np.asarray(image)
    return _Layout(transform, finish, (len(dataset), *first.shape), first.dtype)


def _new_file(size: int) -> IO[bytes]:
    """A file of zeros without a name; `OSError` if there is no room for all of it."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as it is mapped
    try:
        file.truncate(size)
        # To write a mapping where the disk is full ends a process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        file.close()
        raise
    return file


def _parts(
    transform: Transform, picture: Image.Image
) -> tuple[Transform | None, Callable[[Tensor], Tensor]]:
    """Split a transform where a picture becomes a tensor: what makes pixels, and what follows.

    What follows works on a batch of pixels, uint8 [B, H, W, 3]. None as the first part says that it
    cannot be split: what is kept is what it gives.
    """
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    value: Any = picture
    for number, step in enumerate(steps):
        before, value = value, step(value)
        if not isinstance(value, Tensor):
            continue
        rest = steps[number + 1 :]
        if (
            # Any other step may do to later pictures what it does not do to this one.
            (step is to_tensor or isinstance(step, ToTensor))
            and isinstance(before, Image.Image)
            and before.mode == "RGB"
            and torch.equal(value, to_tensor(before))
            and all(isinstance(other, Normalize) for other in rest)
        ):
            return Compose(steps[:number]), _Finish(rest)
        break
    return None, _as_it_is


@dataclass(frozen=True)
class _Finish:
    """From pixels to what the model sees, as `to_tensor` and what normalizes after it."""

    steps: Sequence[Normalize]

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div_(255)
        for step in self.steps:
            normalize(images, step.mean, step.std, inplace=True)
        return images


def _as_it_is(images: Tensor) -> Tensor:
    return images
