"""What a table of images keeps, and what it refuses."""

import datasets
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from cl_merge.data import task_stream
from cl_merge.data.task_stream import TaskStream


def table(sizes, labels=None, label="int64"):
    """Grey pictures of some sizes, the row number in grey."""
    images = [Image.new("RGB", (n, n), (row, row, row)) for row, n in enumerate(sizes)]
    columns = {"image": images, "label": labels or [0] * len(sizes)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(label)})
    return datasets.Dataset.from_dict(columns, features=features)


def stream(rows, **options):
    return TaskStream({"train": rows, "test": rows}, **{"tasks": 1} | options)


def test_what_a_transform_draws_into_a_picture_is_gone_in_the_next_epoch():
    def draw(picture):
        image = to_tensor(picture)
        picture.paste("white", (0, 0, 4, 4))
        return image

    loader = stream(table([4] * 5), train_transform=draw).train_dataloader()
    first, second = (next(iter(loader)).image for _ in range(2))
    assert torch.equal(first, second)


def test_small_pictures_do_not_stand_for_large_ones(monkeypatch):
    assert stream(table([4] * 8 + [40] * 8))._train.decoded_bytes(16) == 3 * 8 * (4**2 + 40**2)
    monkeypatch.setattr(task_stream, "CACHE_BYTES", 300)
    data = stream(table([2, 40] * 8))  # the estimate looks at every second one
    data.train_dataloader()
    assert sorted(data._train._decoded) == [0, 1]
