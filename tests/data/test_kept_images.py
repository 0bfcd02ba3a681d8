"""Images are decoded once whoever asks, and are the same to the bit."""

import io

import datasets
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Lambda, Normalize, Resize, ToTensor

from cl_merge.data import kept_images
from cl_merge.data.images import ImageDataset, ImageTable
from cl_merge.data.kept_images import KeptImages, keep_images
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError

NORMALIZE = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
COUNT = 6
TRANSFORMS = {
    "of open_clip": (open_clip.image_transform(8, is_train=False), np.uint8),
    "without normalizing": (Compose([Resize((8, 8)), ToTensor()]), np.uint8),
    "a function": (lambda picture: NORMALIZE(ToTensor()(picture.resize((8, 8)))), np.float32),
    "a tensor that is more than the picture": (
        Compose([Resize((8, 8)), ToTensor(), Lambda(lambda image: image * 2)]),
        np.float32,
    ),
    "a grey picture": (
        Compose([Resize((8, 8)), Lambda(lambda p: p.convert("L")), ToTensor()]),
        np.float32,
    ),
}


@pytest.fixture(scope="module")
def table():
    """Photographs of several sizes, as JPEG."""
    draw = np.random.default_rng(0)
    rows = []
    for index in range(COUNT):
        file = io.BytesIO()
        pixels = draw.integers(0, 256, (10 + index, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": rows, "label": list(range(COUNT))}
    return datasets.Dataset.from_dict(columns, features=features)


def images_of(table, transform):
    labels = np.arange(len(table))
    return ImageDataset(ImageTable(table), labels[::-1].copy(), labels, labels * 10, transform)


@pytest.mark.parametrize(("transform", "kept_as"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_kept_is_what_the_transform_gives_to_the_bit(table, transform, kept_as):
    dataset = images_of(table, transform)
    kept = keep_images(dataset)
    for _ in range(2):
        for batch, expected in zip(DataLoader(kept, 4), DataLoader(dataset, 4), strict=True):
            assert torch.equal(batch.image, expected.image)
            assert batch.label.tolist() == expected.label.tolist()
            assert batch.task.tolist() == expected.task.tolist()
    assert kept.kept == len(kept) == COUNT
    assert kept._values.dtype == kept_as


def dark_on_light(picture):
    image = ToTensor()(picture.resize((8, 8)))
    return 1 - image if image.mean() > 0.5 else image


def only_where_needed(picture):
    return ToTensor()(picture if picture.size == (8, 8) else picture.resize((8, 8)))


@pytest.mark.parametrize("transform", [dark_on_light, only_where_needed])
def test_a_transform_may_leave_the_first_picture_alone(transform):
    # The last row comes first.
    pictures = [Image.new("RGB", (16, 16), "white"), Image.new("RGB", (8, 8))]
    rows = {"image": pictures, "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = images_of(datasets.Dataset.from_dict(rows, features=features), transform)
    (kept,), (expected,) = DataLoader(keep_images(dataset), 2), DataLoader(dataset, 2)
    assert torch.equal(kept.image, expected.image)


def test_images_in_bfloat16_are_not_kept(table):
    dataset = images_of(table, lambda picture: ToTensor8()(picture).bfloat16())
    assert keep_images(dataset) is dataset


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_what_workers_decode_is_there_for_all(table, start, monkeypatch):
    kept = keep_images(images_of(table, TRANSFORMS["of open_clip"][0]))
    loader = DataLoader(kept, 2, num_workers=2, multiprocessing_context=start)
    first = torch.cat([batch.image for batch in loader])
    assert kept.kept == COUNT
    monkeypatch.setattr(ImageTable, "image", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(torch.cat([batch.image for batch in DataLoader(kept, 3)]), first)


def test_a_process_decodes_its_share_and_then_needs_no_workers(table):
    splits = {"train": table, "test": table}
    stream = TaskStream(splits, tasks=2, batch_size=2, num_workers=2, test_transform=ToTensor8())
    stream.trainer = type("Trainer", (), {"global_rank": 1, "world_size": 2})()
    loader = stream.test_dataloader()
    loader.num_workers = 0  # as if workers had decoded
    labels = [int(label) for batch in loader for label in batch.label]
    assert labels == [1, 3, 5]
    assert loader.dataset.kept == 3
    assert stream.test_dataloader().num_workers == 0
    assert (
        TaskStream(splits, tasks=2, num_workers=2, cache=False).test_dataloader().num_workers == 2
    )


class ToTensor8:
    """Eight pixels square."""

    def __call__(self, picture):
        return ToTensor()(picture.resize((8, 8)))


def test_without_room_nothing_is_kept_unless_it_was_asked_for(table, monkeypatch):
    dataset = images_of(table, TRANSFORMS["of open_clip"][0])
    size = COUNT * 8 * 8 * 3 + COUNT

    def free(amount):
        usage = type("Usage", (), {"free": amount})
        monkeypatch.setattr(kept_images.shutil, "disk_usage", lambda _: usage)

    free(8 * size)
    assert isinstance(keep_images(dataset, processes=2), KeptImages)
    free(8 * size - 1)
    assert keep_images(dataset, processes=2) is dataset
    assert isinstance(keep_images(dataset), KeptImages)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_images.os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match=r"cache=True: .* no room .*No space left.*TMPDIR"):
        keep_images(dataset)
    free(8 * size)  # as a quota leaves it
    assert keep_images(dataset, processes=2) is dataset


def test_images_of_several_sizes_are_refused_by_name(table):
    kept = keep_images(images_of(table, ToTensor()))
    with pytest.raises(
        InputError, match=r"test_transform makes shape .* of image 1, and .*one size"
    ):
        list(DataLoader(kept, 3))
