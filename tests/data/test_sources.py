"""Where images are read from: the hub, by commit, and what is said if it cannot be reached."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from cl_merge.data import sources
from cl_merge.data.sources import cached_commit, hub_commit, is_hub_id, read_images
from cl_merge.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_what_is_on_disk_or_looks_like_it_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    assert not any(map(is_hub_id, ["/data/x", "./x", "~/x", "../x", "x/y.parquet"]))


def test_a_configuration_of_a_hub_data_set_is_named_after_a_colon(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict()

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_images("owner/name:small", revision=COMMIT)
    read_images("owner/name")
    assert asked == [
        (("owner/name", "small"), {"revision": COMMIT}),
        (("owner/name", None), {"revision": None}),
    ]


def test_the_hub_is_asked_for_the_commit(monkeypatch):
    def info(self, name, **_):
        assert name == "owner/name"
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    assert hub_commit("owner/name:small") == COMMIT


def test_a_hub_that_cannot_be_reached_says_no_commit():
    assert hub_commit("owner/name") is None


def test_the_commit_of_a_cached_data_set_is_read_off_its_files():
    def split(*files):
        found = datasets.Dataset.from_dict({"x": [1]})
        found.info.download_checksums = dict.fromkeys(files)
        return found

    place = "hf://datasets/owner/name@{}/train.parquet"
    assert cached_commit({"train": split(place.format(COMMIT))}) == COMMIT
    assert cached_commit({"train": split("/folder/train.parquet")}) is None
    assert cached_commit({"train": split(place.format(COMMIT), place.format("a" * 40))}) is None


def test_without_the_hub_the_message_says_how_to_use_a_local_copy():
    with pytest.raises(InputError) as caught:
        read_images("no-one/nothing", local_copy="set THIS")
    message = str(caught.value)
    assert message.startswith(
        "'no-one/nothing', to read images from: neither a folder here nor to be had from the hub"
    )
    assert message.endswith("set THIS")
    assert "\n" not in message


def test_bars_are_hidden_and_come_back():
    assert datasets.utils.logging.is_progress_bar_enabled()
    with sources.without_bars():
        assert not datasets.utils.logging.is_progress_bar_enabled()
    assert datasets.utils.logging.is_progress_bar_enabled()
