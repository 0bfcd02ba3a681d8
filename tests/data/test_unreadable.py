"""One unreadable image among many: it stops the stream, or is named, counted and left out."""

import logging

import datasets
import numpy as np
import pytest
import tiny
import torch
from lightning import Trainer
from tiny import QUIET

from cl_merge.data import sampling
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError


def broken(rows, which):
    """The same rows, some of them with bytes that are no image."""
    raw = rows.cast_column("image", datasets.Image(decode=False))

    def spoil(row, index):
        return row | {"image": {"bytes": b"no image", "path": None}} if index in which else row

    spoiled = [spoil(row, index) for index, row in enumerate(raw)]
    return datasets.Dataset.from_list(spoiled, features=rows.features)


@pytest.fixture(scope="module")
def splits():
    whole = tiny.splits()
    return {"train": broken(whole["train"], {3, 40}), "test": broken(whole["test"], {0})}


def stream(splits, **options):
    return TaskStream(splits, **{"tasks": 3, "batch_size": 8} | options)


def test_it_stops_the_stream_where_it_is_met_and_the_message_says_what_can_be_done(splits):
    message = r"row 3 of the train split, column 'image', is no readable image .* unreadable=skip"
    with pytest.raises(InputError, match=message):
        list(stream(splits).train_dataloader())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_named_counted_and_left_out_if_so_asked(splits, workers, caplog):
    with caplog.at_level(logging.WARNING):
        made = stream(splits, unreadable="skip", num_workers=workers)
    assert (
        "2 of 72 images of split 'train' cannot be read and are left out: rows 3, 40" in caplog.text
    )
    assert "1 of 30 images of split 'test' cannot be read and are left out: rows 0" in caplog.text
    assert [len(task.train) for task in made.tasks] == [23, 23, 24]
    assert [len(task.test) for task in made.tasks] == [9, 10, 10]
    assert sum(len(batch.label) for batch in made.test_dataloader()) == 29
    for task in made.tasks:
        made.select(task.index)
        assert sum(len(batch.label) for batch in made.train_dataloader()) == len(task.train)
    assert len(made.joint().tasks[0].train) == 70


def test_nothing_is_said_and_nothing_changes_where_all_can_be_read(caplog):
    made = stream(tiny.splits(), unreadable="skip")
    assert "cannot be read" not in caplog.text
    for one, other in zip(made.tasks, stream(tiny.splits()).tasks, strict=True):
        np.testing.assert_array_equal(one.train, other.train)


def test_the_look_at_all_images_draws_no_number(splits):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    stream(splits, unreadable="skip")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_word_is_named(splits):
    with pytest.raises(InputError, match="unknown value of unreadable 'ignore'"):
        stream(splits, unreadable="ignore")


def test_a_task_without_a_readable_image_is_named():
    whole = tiny.splits()
    spoiled = {"train": broken(whole["train"], set(range(24))), "test": whole["test"]}
    with pytest.raises(InputError, match=r"task 0 .* has no training image"):
        stream(spoiled, unreadable="skip")


def test_a_cpu_loads_images_by_itself_and_a_gpu_has_its_share_of_the_cores(monkeypatch):
    assert sampling.automatic_workers(Trainer(**QUIET)) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cores, runs, workers in ((4, "1", 4), (64, "1", 16), (32, "8", 4)):
        monkeypatch.setenv(sampling.SIDE_BY_SIDE, runs)
        monkeypatch.setattr(sampling, "usable_cores", lambda cores=cores: cores)
        assert sampling.automatic_workers(None) == workers
