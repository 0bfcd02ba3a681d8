"""Several data sets as one, read lazily, against the pictures they were made of."""

import datasets
import numpy as np
import pytest
from PIL import Image

from cl_merge.data.concat import NamedSplits, concat
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError


def table(values, labels, names=None, *, image="image", label="label", size=4):
    pictures = [Image.fromarray(np.full((size, size, 3), v, dtype=np.uint8)) for v in values]
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    return datasets.Dataset.from_dict(
        {image: pictures, label: labels, "more": [0] * len(labels)},
        features=datasets.Features(
            {image: datasets.Image(), label: kind, "more": datasets.Value("int64")}
        ),
    )


@pytest.fixture
def members():
    digits = {
        "train": table([10, 11, 12], [0, 1, 1], ["zero", "one"]),
        "test": table([13, 14], [1, 0], ["zero", "one"]),
    }
    # Other columns, other sizes, names for labels, one of them the same, and no test split.
    animals = {"all": table(range(20, 30), ["cat", "one"] * 5, image="photo", label="kind", size=6)}
    return [
        NamedSplits("digits", digits),
        NamedSplits(
            "animals",
            animals,
            image="photo",
            label="kind",
            train_split="all",
            test_fraction=0.2,
        ),
    ]


def test_labels_go_on_where_those_of_the_last_data_set_end(members):
    splits, names = concat(members)
    assert names == [["zero", "one"], ["cat", "one"]]
    label = splits["train"].features["label"]
    assert label.names == ["digits: zero", "digits: one", "animals: cat", "animals: one"]
    assert splits["train"].features == splits["test"].features
    assert splits["train"].column_names == ["image", "label", "source"]
    assert len(splits["train"]) == 3 + 8
    assert len(splits["test"]) == 2 + 2
    seen = set()
    for split in splits.values():
        for row in split:
            value = np.asarray(row["image"])[0, 0, 0]
            seen.add(int(value))
            if row["source"] == 0:
                assert row["label"] == {10: 0, 11: 1, 12: 1, 13: 1, 14: 0}[value]
            else:
                assert row["label"] == 2 + value % 2
                assert row["image"].size == (6, 6)
    assert seen == {10, 11, 12, 13, 14, *range(20, 30)}


def test_no_image_is_decoded(members, monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    splits, _ = concat(members)
    stream = TaskStream(splits, scenario="source", domain="source")
    assert [len(task.train) for task in stream.tasks] == [3, 8]


def test_every_data_set_is_a_task_with_its_own_classes(members):
    splits, _ = concat(members)
    stream = TaskStream(splits, scenario="source", domain="source", order=["animals", "digits"])
    assert [task.name for task in stream.tasks] == ["animals", "digits"]
    assert [task.classes for task in stream.tasks] == [(2, 3), (0, 1)]
    assert stream.tasks[1].class_names == ("digits: zero", "digits: one")
    batch = next(iter(stream.train_dataloader()))
    assert set(batch.label.tolist()) <= {2, 3}


def test_the_division_of_a_data_set_depends_on_its_own_seed(members):
    first, same = (concat(members)[0]["test"]["label"] for _ in range(2))
    assert list(first) == list(same)
    names = {
        seed: [
            np.asarray(image)[0, 0, 0]
            for image in concat([NamedSplits(**vars(members[1]) | {"split_seed": seed})])[0][
                "test"
            ]["image"]
        ]
        for seed in range(4)
    }
    assert len({tuple(found) for found in names.values()}) > 1


def test_data_sets_with_one_name_and_missing_columns_are_named(members):
    with pytest.raises(InputError, match="^data sets to put together: digits, digits; expected"):
        concat([members[0], members[0]])
    wrong = NamedSplits("animals", members[1].splits, train_split="all", test_fraction=0.2)
    with pytest.raises(InputError, match="^data set 'animals': unknown column of the all split"):
        concat([wrong])
    with pytest.raises(InputError, match="^data set 'animals': the data set has no split 'train'"):
        concat([NamedSplits("animals", members[1].splits)])
