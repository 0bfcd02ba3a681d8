"""TaskStream: one task at a time from any data set."""

import io
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from cl_merge.callbacks import MergeCallback
from cl_merge.data.images import Sample
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError
from cl_merge.training.fit import fit_stream

NAMES = ["ant", "bee", "cat", "dog"]


def picture(value: int, size: int = 4) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def table(labels, *, names=NAMES, domains=None):
    """Images whose grey value is their row number, so that each can be told from the others."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    if isinstance(labels[0], str):
        label = datasets.Value("string")
    columns = {"image": [picture(row) for row in range(len(labels))], "label": labels}
    features = {"image": datasets.Image(), "label": label}
    if domains:
        columns["domain"] = domains
        features["domain"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="module")
def splits():
    return {"train": table([0, 1, 2, 3] * 5), "test": table([0, 1, 2, 3] * 2)}


def rows_of(loader) -> list[int]:
    return [round(float(value) * 255) for batch in loader for value in batch.image[:, 0, 0, 0]]


def test_the_training_loader_shows_the_current_task_and_the_test_loader_all(splits):
    stream = TaskStream(splits, tasks=2, batch_size=3)
    seen = []
    for task in stream.tasks:
        assert stream.select(task.index) is stream.task
        labels = torch.cat([batch.label for batch in stream.train_dataloader()])
        assert set(labels.tolist()) == set(task.classes)
        seen += rows_of(stream.train_dataloader())
        assert rows_of(stream.test_dataloader()) == list(range(8))
    assert sorted(seen) == list(range(20))


def test_batches_carry_image_label_and_task(splits):
    stream = TaskStream(splits, tasks=2, batch_size=8)
    batch = next(iter(stream.test_dataloader()))
    assert isinstance(batch, Sample)
    image, label, task = batch
    assert image.shape == (8, 3, 4, 4)
    assert image.dtype == torch.float32
    assert label.tolist() == [0, 1, 2, 3] * 2
    assert task.tolist() == [0, 0, 1, 1] * 2


def test_same_seed_same_batches_whatever_ran_before(splits):
    stream = TaskStream(splits, tasks=2, batch_size=3, seed=5)
    first = rows_of(stream.train_dataloader())
    torch.rand(7)
    list(stream.test_dataloader())
    assert rows_of(stream.train_dataloader()) == first
    assert rows_of(TaskStream(splits, tasks=2, seed=6).train_dataloader()) != first


def test_loading_test_images_leaves_the_global_generator_alone(splits):
    stream = TaskStream(splits, tasks=2)
    before = torch.get_rng_state()
    list(stream.test_dataloader())
    list(stream.test_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_changes_nothing_but_the_number_of_decodings(splits, monkeypatch):
    decoded = []
    original = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image,
        "decode_example",
        lambda self, value, **kw: decoded.append(1) or original(self, value, **kw),
    )
    plain = TaskStream(splits, tasks=1, cache=False, seed=3)
    expected = [rows_of(plain.train_dataloader()) for _ in range(2)]
    decoded.clear()
    cached = TaskStream(splits, tasks=1, cache=True, seed=3)
    assert [rows_of(cached.train_dataloader()) for _ in range(2)] == expected
    assert len(decoded) == 20
    assert [rows_of(cached.test_dataloader()) for _ in range(3)] == [list(range(8))] * 3
    assert len(decoded) == 20 + 8 + 1  # the first test image shows what is to be kept


def test_splitting_fifty_thousand_images_decodes_none_and_takes_well_under_a_second(monkeypatch):
    buffer = io.BytesIO()
    picture(0).save(buffer, "png")
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": buffer.getvalue(), "path": None}] * 50_000,
            "label": np.arange(50_000) % 100,
        },
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=100)}
        ),
    )
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded")
    )
    begin = time.process_time()  # what else the machine does is nothing to it
    stream = TaskStream({"train": rows, "test": rows}, tasks=50, images_per_class=300)
    assert time.process_time() - begin < 1.0
    assert sum(len(task.train) for task in stream.tasks) == 30_000


def test_string_labels_become_classes_in_alphabetical_order():
    data = {"train": table(["dog", "ant", "dog", "bee"]), "test": table(["bee", "dog", "ant"])}
    stream = TaskStream(data, tasks=3)
    assert stream.class_names == ["ant", "bee", "dog"]
    assert next(iter(stream.test_dataloader())).label.tolist() == [1, 2, 0]


def test_two_splits_that_number_the_same_names_differently_agree():
    data = {
        "train": table([0, 1], names=["ant", "bee"]),
        "test": table([0, 1], names=["bee", "ant"]),
    }
    assert next(iter(TaskStream(data, tasks=1).test_dataloader())).label.tolist() == [1, 0]


def test_domains_become_tasks_in_the_order_asked_for():
    data = {
        "train": table([0, 1, 2, 3], domains=["photo", "art", "art", "photo"]),
        "test": table([0, 1], domains=["art", "photo"]),
    }
    stream = TaskStream(data, scenario="domain", domain="domain", order=["photo", "art"])
    assert [task.name for task in stream.tasks] == ["photo", "art"]
    assert rows_of(stream.train_dataloader()) in ([0, 3], [3, 0])
    assert next(iter(stream.test_dataloader())).task.tolist() == [1, 0]


def test_sources_become_tasks_with_classes_of_their_own():
    rows = table([0, 1, 2, 3], domains=["x", "x", "y", "y"])
    stream = TaskStream({"train": rows, "test": rows}, scenario="source", domain="domain")
    assert [(task.name, task.classes) for task in stream.tasks] == [("x", (0, 1)), ("y", (2, 3))]
    with pytest.raises(InputError, match=r"^tasks=3, but the data set has 2 sources \(x, y"):
        TaskStream({"train": rows, "test": rows}, scenario="source", domain="domain", tasks=3)


def test_held_out_images_are_no_training_images():
    stream = TaskStream({"train": table([0, 1, 2, 3] * 5)}, tasks=1, test_fraction=0.2)
    assert sorted(rows_of(stream.train_dataloader()) + rows_of(stream.test_dataloader())) == list(
        range(20)
    )
    assert len(stream.tasks[0].test) == 4


def test_a_held_out_share_of_each_class_is_not_trained_on_and_shown_as_in_a_test(splits):
    whole = TaskStream(splits, tasks=2, seed=1)
    stream = TaskStream(splits, tasks=2, held_out=0.3, batch_size=3, seed=1)
    seen = []
    for task, before in zip(stream.tasks, whole.tasks, strict=True):
        stream.select(task.index)
        assert set(task.train) | set(task.held_out) == set(before.train)
        assert set(rows_of(stream.train_dataloader())) == set(task.train.tolist())
        seen += task.held_out.tolist()
        assert rows_of(stream.held_out_dataloader()) == seen
        labels = torch.cat([batch.label for batch in stream.held_out_dataloader()])
        # 2 of the 5 images of each class.
        assert labels.bincount().tolist() == [2, 2, 2, 2][: len(labels) // 2]
        tasks = torch.cat([batch.task for batch in stream.held_out_dataloader()])
        assert tasks.bincount().tolist() == [4] * (task.index + 1)
    again = TaskStream(splits, tasks=2, held_out=0.3, seed=1)
    assert [task.held_out.tolist() for task in again.tasks] == [
        task.held_out.tolist() for task in stream.tasks
    ]
    assert sorted(stream.joint().task.held_out) == sorted(seen)
    assert sorted(rows_of(stream.joint().held_out_dataloader())) == sorted(seen)


def test_held_out_images_are_of_the_limited_ones(splits):
    stream = TaskStream(splits, tasks=2, images_per_class=2, held_out=0.1)
    assert [len(task.train) for task in stream.tasks] == [2, 2]
    assert [len(task.held_out) for task in stream.tasks] == [2, 2]


def test_showing_held_out_images_leaves_the_global_generator_and_the_training_alone(splits):
    stream = TaskStream(splits, tasks=2, held_out=0.2, seed=5)
    first, before = rows_of(stream.train_dataloader()), torch.get_rng_state()
    for cache in (True, False):
        again = TaskStream(splits, tasks=2, held_out=0.2, seed=5, cache=cache)
        assert rows_of(again.held_out_dataloader()) == rows_of(stream.held_out_dataloader())
        assert rows_of(again.train_dataloader()) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cache", [True, False])
def test_the_images_of_a_task_are_shown_as_in_a_test(splits, cache):
    def never(image):
        raise AssertionError("a training transform")

    stream = TaskStream(
        splits, tasks=2, held_out=0.2, batch_size=5, cache=cache, train_transform=never
    )
    for task in stream.tasks:
        stream.select(task.index)
        before = torch.get_rng_state()
        shown = list(stream.task_dataloader())
        assert torch.equal(torch.get_rng_state(), before)
        assert rows_of(shown) == task.train.tolist() == rows_of(stream.task_dataloader())
        assert {int(index) for batch in shown for index in batch.task} == {task.index}
        labels = torch.cat([batch.label for batch in shown])
        assert labels.tolist() == [splits["train"]["label"][row] for row in task.train]
    joint = stream.joint()
    assert rows_of(joint.task_dataloader()) == joint.task.train.tolist()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("images", [1, 4, 999])
def test_some_images_of_a_task_are_spread_over_it_whatever_the_processes(splits, world, images):
    stream = TaskStream(splits, tasks=2, batch_size=2)
    every, shares = stream.task.train.tolist(), []
    for rank in range(world):
        stream.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        shares += rows_of(stream.sample_dataloader(images))
    count = min(images, len(every))
    assert sorted(shares) == [every[index * len(every) // count] for index in range(count)]


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_processes_share_the_images_of_a_task_also_if_there_are_fewer(splits, world):
    stream = TaskStream(splits, tasks=2, batch_size=2)
    stream.select(1)
    shares = []
    for rank in range(world):
        stream.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        shares.append(rows_of(stream.task_dataloader()))
    assert sorted(row for share in shares for row in share) == stream.task.train.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(stream.task.train) < 64


def test_with_nothing_held_out_there_is_nothing_to_show(splits):
    stream = TaskStream(splits, tasks=2)
    assert [len(task.held_out) for task in stream.tasks] == [0, 0]
    with pytest.raises(InputError, match=r"^no training image is held out: give .* held_out=0.1$"):
        stream.held_out_dataloader()


def test_the_scale_of_a_stream_is_chosen_on_its_held_out_images():
    stream = tiny.stream(held_out=0.25)
    merge = MergeCallback("magmax", scale="auto")
    fit_stream(tiny.classifier(), stream, callbacks=[merge], trainer=tiny.QUIET | {"max_epochs": 2})
    assert len(merge.chosen) == 3
    with pytest.raises(InputError, match="^no training image is held out"):
        fit_stream(
            tiny.classifier(),
            tiny.stream(),
            callbacks=[MergeCallback("magmax", scale="auto")],
            trainer=tiny.QUIET,
        )


def test_a_limit_that_leaves_a_task_without_training_images_is_an_error():
    data = {
        "train": table([0, 0, 0], domains=["art", "photo", "sketch"]),
        "test": table([0, 0, 0], domains=["art", "photo", "sketch"]),
    }
    with pytest.raises(InputError, match=r"^task \d \(\w+\) has no training image"):
        TaskStream(data, scenario="domain", domain="domain", images_per_class=1)


def test_a_sampler_of_the_users_own_decides_the_order(splits):
    stream = TaskStream(splits, tasks=1, sampler=torch.utils.data.SequentialSampler)
    assert rows_of(stream.train_dataloader()) == list(range(20))


def test_the_joint_stream_has_all_images_in_one_task_and_tests_by_the_old_ones(splits):
    stream = TaskStream(splits, tasks=2, order=[2, 0, 3, 1])
    stream.select(1)
    joint = stream.joint()
    (task,) = joint.tasks
    assert (task.index, task.name, joint.task) == (0, "joint", task)
    assert task.classes == (2, 0, 3, 1)
    assert task.class_names == ("cat", "ant", "dog", "bee")
    assert task.train.tolist() == list(range(20))
    assert task.test.tolist() == list(range(8))
    assert sorted(rows_of(joint.train_dataloader())) == list(range(20))
    for loader in (joint.test_dataloader(), joint.joint().test_dataloader()):
        assert torch.cat([batch.task for batch in loader]).tolist() == [0, 1, 0, 1] * 2
    assert joint.joint().test_tasks == joint.test_tasks == stream.test_tasks == stream.tasks
    assert (stream.task.index, len(stream.tasks)) == (1, 2)


def test_joint_tasks_hold_classes_once_and_keep_to_the_limit_of_images():
    domains = ["photo", "art"] * 8
    data = {
        "train": table([0, 1, 2, 3] * 4, domains=domains),
        "test": table([0, 1], domains=["art", "photo"]),
    }
    stream = TaskStream(
        data, scenario="domain", domain="domain", order=["photo", "art"], images_per_class=2
    )
    (task,) = stream.joint().tasks
    assert task.classes == (0, 1, 2, 3)
    assert sorted(row % 4 for row in task.train.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(rows_of(stream.joint().train_dataloader())) == task.train.tolist()
    assert next(iter(stream.joint().test_dataloader())).task.tolist() == [1, 0]


def test_a_task_that_is_replaced_counts_in_the_joint_stream_and_its_columns(splits):
    stream = TaskStream(splits, tasks=2)
    stream.tasks[1] = replace(stream.tasks[1], test=stream.tasks[1].test[:-1])
    assert stream.test_tasks[1] is stream.tasks[1]
    joint = stream.joint()
    for loader in (stream.test_dataloader(), joint.test_dataloader()):
        assert torch.cat([batch.task for batch in loader]).bincount().tolist() == [4, 3]
    stream.select(1)
    assert (joint.task.index, len(joint.task.test)) == (0, 7)


def test_joint_training_fills_one_row_with_a_column_for_every_task():
    model, data = tiny.classifier(), tiny.stream()
    trainer = tiny.QUIET | {"max_epochs": 20}
    matrix = fit_stream(model, data.joint(), trainer=trainer, seed=0).accuracy
    assert matrix.accuracy().shape == (1, 3)
    assert matrix.total.tolist() == [10, 10, 10]
    images, labels, tasks = (
        torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True)
    )
    with torch.no_grad():
        hits = model(images).argmax(dim=1) == labels
    assert matrix.correct()[0].tolist() == [int(hits[tasks == task].sum()) for task in range(3)]
    assert matrix.accuracy().min() > 50
    assert bool((matrix.correct(aware=True) >= matrix.correct()).all())


def test_folders_and_parquet_files_are_read(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("ant", "bee"):
            for number in range(count):
                file = tmp_path / "images" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(number).save(file)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table([0, 1, 2, 3]).to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    from_images = TaskStream(tmp_path / "images", tasks=2)
    assert from_images.class_names == ["ant", "bee"]
    assert [len(task.train) for task in from_images.tasks] == [3, 3]
    from_parquet = TaskStream(tmp_path / "parquet", tasks=2)
    assert from_parquet.class_names == NAMES
    saved = datasets.DatasetDict({"train": table([0, 1]), "test": table([0])})
    saved.save_to_disk(tmp_path / "saved")
    assert TaskStream(tmp_path / "saved", tasks=1).class_names == NAMES


def test_real_photographs(shared):
    stream = TaskStream(
        shared / "data" / "caltech101",
        tasks=10,
        images_per_class=20,
        train_transform=lambda image: to_tensor(image.resize((8, 8))),
        test_transform=lambda image: to_tensor(image.resize((8, 8))),
        cache=False,
    )
    assert [len(task.classes) for task in stream.tasks] == [10] * 9 + [11]
    assert sum(len(task.train) for task in stream.tasks) == 2020
    assert sum(len(task.test) for task in stream.tasks) == 1334
    assert next(iter(stream.train_dataloader())).image.shape == (128, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": 9},
            "tasks=9 is more than the 4 classes of the data set; every task needs a class of its own",
        ),
        ({"tasks": 0}, "tasks=0; expected a whole number from 1"),
        (
            {"scenario": "clas"},
            "unknown scenario 'clas'; did you mean 'class'? Known: class, domain, data, source",
        ),
        (
            {"label": "lable"},
            "unknown column of the train split 'lable'; did you mean 'label'? Known: image, label; name the one with the labels: label=...",
        ),
        (
            {"scenario": "domain"},
            "scenario=domain needs the column of the domains: domain=...",
        ),
        (
            {"scenario": "source"},
            "scenario=source needs the column of the domains: domain=...",
        ),
        (
            {"train_split": "training"},
            "the data set has no split 'training'; it has train, test: name the one to train on with train_split=...",
        ),
        (
            {"test_split": "val"},
            "the data set has no split 'val'; it has train, test: name the one to test on with test_split=..., or hold images out with test_fraction=0.2",
        ),
        ({"test_fraction": 1.5}, "test_fraction=1.5; expected more than 0, below 1"),
        ({"images_per_class": 0}, "images_per_class=0; expected 1 or more"),
    ],
)
def test_wrong_options_are_named(splits, options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        TaskStream(splits, **{"tasks": 2} | options)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, 2, 3], [0, -1], "the test split has labels outside the head: -1; expected 0 to 3"),
        ([0, 1, -1, 3], [0], "the train split has labels outside the head: -1; expected 0 to 3"),
        (["a", "b"], ["c"], "the test split has labels that are not in the training split: c"),
    ],
)
def test_labels_outside_the_head_are_named(train, test, message):
    names = None if isinstance(train[0], int) else NAMES
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        TaskStream({"train": table(train, names=names), "test": table(test, names=names)}, tasks=1)


def test_a_corrupt_image_is_named():
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "label": [0]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant"])}
        ),
    )
    stream = TaskStream({"train": rows, "test": rows}, tasks=1)
    with pytest.raises(
        InputError, match="^row 0 of the train split, column 'image', is no readable"
    ):
        list(stream.train_dataloader())


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        InputError, match=f"^'{re.escape(str(tmp_path))}/x', to read images from: no such"
    ):
        TaskStream(tmp_path / "x")
    with pytest.raises(
        InputError,
        match="^'no-one/nothing', to read images from: neither a folder here nor to be had",
    ):
        TaskStream("no-one/nothing")


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(InputError, match="cannot be read as a data set"):
        TaskStream(tmp_path)


def test_select_refuses_a_task_that_is_not_there(splits):
    with pytest.raises(InputError, match="^no task 2: the stream has tasks 0 to 1$"):
        TaskStream(splits, tasks=2).select(2)
