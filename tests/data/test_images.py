"""What a table of images keeps, and what it refuses."""

import io

import datasets
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from cl_merge.data import task_stream
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError


def table(sizes, labels=None, label=None):
    """Grey pictures of some sizes, the row number in grey."""
    images = [Image.new("RGB", (n, n), (row, row, row)) for row, n in enumerate(sizes)]
    columns = {"image": images, "label": labels or [0] * len(sizes)}
    features = datasets.Features(
        {"image": datasets.Image(), "label": label or datasets.Value("int64")}
    )
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


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (["a", None], datasets.Value("string"), "row 1 of the train split, column 'label', has no"),
        ([1, None], datasets.Value("int64"), "row 1 of the train split, column 'label', has no"),
        ([None, 0], datasets.ClassLabel(names=["a"]), "row 0 of the train split, column 'label'"),
        ([[0], [1]], datasets.Sequence(datasets.Value("int64")), "label.*int64.*; expected one"),
    ],
)
def test_every_image_has_one_label(labels, label, message):
    with pytest.raises(InputError, match=message):
        stream(table([4, 4], labels, label))


def test_a_data_set_of_a_task_holds_its_own_labels_only():
    data = TaskStream({"train": table([4] * 6), "test": table([4] * 6)}, tasks=2, scenario="data")
    dataset = data.train_dataloader().dataset
    assert len(dataset._labels) == len(dataset._tasks) == 3


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


# Polars writes large ones, which datasets 3 cannot cast.
BINARY = pa.large_binary() if int(datasets.__version__.split(".")[0]) >= 4 else pa.binary()


@pytest.mark.parametrize(
    "rows",
    [
        table([4]).with_format("torch"),
        table([4]).with_transform(lambda rows: rows),
        table([4]).cast_column("image", datasets.Image(decode=False)),
        datasets.Dataset(pa.table({"image": [{"bytes": png(), "path": None}], "label": [0]})),
        datasets.Dataset(pa.table({"image": pa.array([png()], BINARY), "label": [0]})),
    ],
    ids=["format", "function", "not decoded", "struct", "bytes"],
)
def test_images_are_decoded_whatever_wrote_them(rows):
    assert stream(rows).train_dataloader().dataset[0].image.shape == (3, 4, 4)


def test_a_column_without_images_is_named():
    message = r"^column 'label' of the train split holds .*int64.*; expected images.*image=\.\.\.$"
    with pytest.raises(InputError, match=message):
        stream(table([4]), image="label")
