"""Data sets of the hub: read by the real clients from a hub on this machine, with its faults."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from fake_hub import FakeHub, Repository, set_offline, use_hub
from hub_repositories import card, parquet, picture

from cl_merge.data.hub import describe_hub, read_hub
from cl_merge.data.hub_cache import cached_commit, read_cached
from cl_merge.data.sources import read_images
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError

NAME, COMMIT, LATER = "owner/Some-Photos", "1" * 40, "2" * 40
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
)


def rows(count, first=0):
    return [
        {"image": {"bytes": picture(first + i), "path": f"{i}.png"}, "label": i % 2}
        for i in range(count)
    ]


def photos(commit=COMMIT, **more):
    counts = {"train": 6, "validation": 3, "test": 4}
    files = {
        "README.md": card([("default", "data", counts, FEATURES)]),
        "data/train-00000-of-00002.parquet": parquet(rows(3), FEATURES),
        "data/train-00001-of-00002.parquet": parquet(rows(3, 3), FEATURES),
        "data/validation-00000-of-00001.parquet": parquet(rows(3, 6), FEATURES),
        "data/test-00000-of-00001.parquet": parquet(rows(4, 9), FEATURES),
    }
    return Repository("datasets", NAME, files, commit, **more)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = FakeHub()
    made.add(photos())
    with made.serving():
        use_hub(monkeypatch, made.endpoint, tmp_path / "cache")
        yield made


def parts_sent(hub):
    return {file.split("/")[-1].split("-")[0] for file in hub.sent if file.endswith(".parquet")}


def test_the_hub_says_what_a_data_set_is_before_any_image_is_downloaded(hub):
    found = describe_hub(NAME, COMMIT)
    assert found.commit == COMMIT
    assert {split: len(files) for split, files in found.files.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert found.rows == {"train": 6, "validation": 3, "test": 4}
    assert found.features == FEATURES
    needs = found.needs(["train"])
    files = hub.repositories["datasets", NAME].files
    assert needs.download == sum(len(files[path]) for path in found.files["train"])
    assert needs.written == 6000  # as the card says
    assert not parts_sent(hub)


def test_only_the_splits_that_are_used_are_downloaded(hub):
    found = read_images(NAME, revision=COMMIT, splits=["train"])
    assert {split: len(images) for split, images in found.items()} == {"train": 6}
    assert found["train"].features == FEATURES
    assert parts_sent(hub) == {"train"}
    assert cached_commit(found) == COMMIT
    stream = TaskStream(NAME, tasks=2, revision=COMMIT)
    assert stream.class_names == ["cat", "dog"]
    assert parts_sent(hub) == {"train", "test"}


def test_without_a_choice_all_of_it_is_read(hub):
    assert set(read_images(NAME, revision=COMMIT)) == {"train", "validation", "test"}


def test_a_union_of_splits_is_trained_on(hub):
    stream = TaskStream(NAME, tasks=2, revision=COMMIT, train_split="train+validation")
    assert stream.images_read == {"train": 9, "test": 4}
    assert parts_sent(hub) == {"train", "validation", "test"}


def test_a_split_that_there_is_not_is_named_before_anything_is_downloaded(hub):
    message = "data set 'owner/Some-Photos' has no split 'val'; it has train, validation, test"
    with pytest.raises(InputError, match=message):
        TaskStream(NAME, tasks=2, revision=COMMIT, test_split="val")
    assert not parts_sent(hub)


def test_what_the_cache_has_is_read_without_a_question(hub, monkeypatch):
    first = read_hub(NAME, COMMIT, ["train", "test"])
    hub.asked.clear()
    second = read_hub(NAME, COMMIT, ["train", "test"])
    assert [image["label"] for image in second["train"]] == [
        image["label"] for image in first["train"]
    ]
    set_offline(monkeypatch)
    assert len(read_hub(NAME, COMMIT, ["test"])["test"]) == 4
    assert hub.asked == []


def test_no_other_commit_is_read_in_place_of_the_one_that_is_asked_for(hub, monkeypatch):
    read_hub(NAME, COMMIT, ["train"])
    set_offline(monkeypatch)
    with pytest.raises(InputError, match="nor to be had from the hub"):
        read_images(NAME, revision=LATER, splits=["train"])


def test_the_newest_in_the_cache_is_read_without_the_hub_if_no_commit_is_asked_for(
    hub, monkeypatch, caplog
):
    assert describe_hub(NAME).commit == COMMIT
    read_hub(NAME, None, ["train"])
    hub.add(photos(LATER))
    read_hub(NAME, None, ["train"])
    set_offline(monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = read_hub(NAME, None, ["train"])
    assert cached_commit(found) == LATER
    assert "owner/Some-Photos: HF_HUB_OFFLINE is set; it is read as it is in the cache" in (
        caplog.text
    )


def test_a_folder_of_the_cache_that_lacks_rows_is_not_read(hub):
    found = read_hub(NAME, COMMIT, ["train", "test"])
    train, test = (Path(found[s].cache_files[0]["filename"]) for s in ("train", "test"))
    train.unlink()
    assert read_cached(NAME, COMMIT, ["train"]) is None
    train.write_bytes(test.read_bytes())
    assert read_cached(NAME, COMMIT, ["train"]) is None


def test_a_configuration_is_named_after_a_colon(hub):
    other = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    files = {"small/train-0.parquet": parquet(rows(2), FEATURES)}
    texts = [row | {"label": "cat"} for row in rows(5)]
    files["large/train-0.parquet"] = parquet(texts, other)
    sizes = [("large", "large", {"train": 5}, other), ("small", "small", {"train": 2}, FEATURES)]
    hub.add(Repository("datasets", "owner/two", files | {"README.md": card(sizes)}))
    for name, number in (("large", 5), ("small", 2)):
        for _ in range(2):  # from the hub, then from the cache
            found = read_images(f"owner/two:{name}", revision=COMMIT, splits=["train"])
            assert len(found["train"]) == number
    with pytest.raises(InputError, match=r"\(Config name is missing"):
        read_images("owner/two", revision=COMMIT, splits=["train"])


def test_a_connection_that_breaks_is_taken_up_again(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = "data/train-00001-of-00002.parquet"
    size = len(hub.repositories["datasets", NAME].files[path])
    hub.cut[path] = 1200
    assert len(read_hub(NAME, COMMIT, ["train"])["train"]) == 6
    assert hub.sent[path] <= size + 1200


def test_a_download_that_fails_leaves_nothing_half_and_is_gone_on_with(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = "data/train-00001-of-00002.parquet"
    hub.cut[path] = 1200
    hub.broken.add(path)
    with pytest.raises(InputError, match="nor to be had from the hub"):
        read_images(NAME, revision=COMMIT, splits=["train"])
    assert read_cached(NAME, COMMIT, ["train"]) is None
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    hub.broken.clear()
    hub.sent.clear()
    assert len(read_images(NAME, revision=COMMIT, splits=["train"])["train"]) == 6
    assert "data/train-00000-of-00002.parquet" not in hub.sent  # it was complete


def test_a_split_of_another_size_than_the_card_says_is_named(hub, caplog):
    files = hub.repositories["datasets", NAME].files
    files["data/train-00001-of-00002.parquet"] = parquet(rows(2, 3), FEATURES)
    with caplog.at_level(logging.WARNING):
        assert len(read_hub(NAME, COMMIT, ["train"])["train"]) == 5
    assert "owner/Some-Photos: split 'train' has 5 images, but the hub says 6" in caplog.text


def test_a_hub_that_is_busy_is_asked_again_after_as_long_as_it_says(hub, monkeypatch, caplog):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub.busy = 2
    with caplog.at_level(logging.INFO):
        read_hub(NAME, COMMIT, ["train"])
    assert waited == [7.0, 7.0]
    assert caplog.text.count("the hub is busy: it is asked again in 7 s") == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gated", r"\(Dataset 'owner/Some-Photos' is a gated dataset on the Hub. You must be auth"),
        ("revision", r"\(it has no commit 3{40}\)"),
        ("missing", r"\(the hub has nothing of this name, or it is private\)"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub, fault, message):
    hub.repositories["datasets", NAME].gated = fault == "gated"
    name = "owner/nothing" if fault == "missing" else NAME
    commit = "3" * 40 if fault == "revision" else COMMIT
    with pytest.raises(InputError, match=message) as error:
        read_images(name, revision=commit, splits=["train"])
    assert "\n" not in str(error.value)


def test_without_a_network_the_hub_is_asked_once(hub, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", Path("/nowhere"))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"\(the hub cannot be reached\)"):
        read_images(NAME, revision=COMMIT, splits=["train"])
    assert time.monotonic() - began < 1


def test_a_disk_without_room_is_named_before_anything_is_downloaded(hub, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 << 20))
    message = (
        r"^data set 'owner/Some-Photos' needs \d+.\d kB at .*, where 2.1 MB are free; make room"
    )
    with pytest.raises(InputError, match=message):
        read_images(NAME, revision=COMMIT, splits=["train"])
    assert not parts_sent(hub)
