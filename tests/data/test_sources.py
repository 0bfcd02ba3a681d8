"""Where images are read from, and what is said if the hub cannot be reached."""

import datasets
import pytest
from PIL import Image

from cl_merge.data import sources
from cl_merge.data.sources import is_hub_id, read_images
from cl_merge.errors import InputError


def test_what_is_on_disk_or_looks_like_it_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    assert not any(map(is_hub_id, ["/data/x", "./x", "~/x", "../x", "x/y.parquet"]))


def test_without_the_hub_the_message_says_how_to_use_a_local_copy():
    with pytest.raises(InputError) as caught:
        read_images("no-one/nothing", local_copy="set THIS")
    message = str(caught.value)
    assert message.startswith(
        "'no-one/nothing', to read images from: neither a folder here nor to be had from the hub"
    )
    assert message.endswith("set THIS")
    assert "\n" not in message


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose name is a pattern of file names, too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["train", "test tube", "dev board"])
def test_a_class_may_be_called_as_a_split(folder, name):
    for split in ("train", "test"):
        for label in ("car", name):
            (folder / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / split / label / "1.png")
    found = read_images(folder)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "test": 2}
    assert found["train"].features["label"].names == sorted(["car", name])


def test_any_folder_has_parquet_files(folder):
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(folder / "test-1.parquet")
    assert len(read_images(folder)["test"]) == 2
    assert len(read_images(folder / "test-1.parquet")["train"]) == 2


def test_bars_are_hidden_and_come_back():
    assert datasets.utils.logging.is_progress_bar_enabled()
    with sources.without_bars():
        assert not datasets.utils.logging.is_progress_bar_enabled()
    assert datasets.utils.logging.is_progress_bar_enabled()
