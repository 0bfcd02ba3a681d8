"""Domains that are read off the names of files."""

import datasets
import numpy as np
import pytest
from PIL import Image

from cl_merge.data.sources import read_images
from cl_merge.data.tables import with_domains
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError

PATTERN = "([a-z]+)_[0-9]+"


@pytest.fixture
def folder(tmp_path):
    """Two classes in two renditions, as in the archive of ImageNet-R."""
    for name, kind, value in (("newt", "art", 1), ("newt", "toy", 2), ("pug", "art", 3)):
        for number in range(4):
            path = tmp_path / "train" / name / f"{kind}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 10 * value + number, np.uint8)).save(path)
    return tmp_path


def test_the_domain_is_what_the_group_matches(folder):
    rows = read_images(folder)["train"]
    found = with_domains(rows, "image", PATTERN)
    assert list(found["domain"]) == ["art"] * 4 + ["toy"] * 4 + ["art"] * 4


def test_domains_of_files_become_tasks_and_survive_a_copy_as_parquet(folder, tmp_path):
    options = {
        "scenario": "domain",
        "domain_pattern": PATTERN,
        "order": ["toy", "art"],
        "test_fraction": 0.25,
    }
    stream = TaskStream(read_images(folder), **options)
    assert [task.name for task in stream.tasks] == ["toy", "art"]
    assert sum(len(task.train) for task in stream.tasks) == 9
    stream.select(0)
    values = [float(v) * 255 for b in stream.train_dataloader() for v in b.image[:, 0, 0, 0]]
    assert {round(value) // 10 for value in values} == {2}
    parquet = tmp_path / "copy" / "train.parquet"
    parquet.parent.mkdir()
    read_images(folder)["train"].to_parquet(parquet)
    copied = TaskStream(parquet.parent, **options)
    assert [len(task.train) for task in copied.tasks] == [len(t.train) for t in stream.tasks]


def test_the_division_is_that_of_the_split_seed_whatever_the_seed(folder):
    def test_rows(**seeds):
        stream = TaskStream(read_images(folder), tasks=1, test_fraction=0.25, **seeds)
        return [float(v) for b in stream.test_dataloader() for v in b.image[:, 0, 0, 0]]

    assert test_rows(split_seed=1, seed=5) == test_rows(split_seed=1, seed=6) == test_rows(seed=1)
    assert len({tuple(test_rows(split_seed=seed)) for seed in range(4)}) > 1


def test_names_that_say_no_domain_are_named(folder):
    rows = read_images(folder)["train"]
    with pytest.raises(
        InputError, match=r"^row 0, column 'image', has the file name .*art_0.png, "
    ):
        with_domains(rows, "image", "(x)")
    bare = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (4, 4))]}, features=datasets.Features(image=datasets.Image())
    )
    with pytest.raises(InputError, match="^row 0, column 'image', has no file name, which says no"):
        with_domains(bare, "image", PATTERN)


@pytest.mark.parametrize(("pattern", "message"), [("[a-z]+", "has no group"), ("(", "no regular")])
def test_wrong_patterns_are_named(folder, pattern, message):
    with pytest.raises(InputError, match=message):
        with_domains(read_images(folder)["train"], "image", pattern)
