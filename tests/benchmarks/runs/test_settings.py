"""The configuration of a run: the user's files and folders are found from anywhere."""

import pytest

from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.config.reading import to_yaml


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder and the file of a data set in the folder where commands are called."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "own.yaml").write_text("source: photos")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "photos")


def test_data_is_named_from_the_root(photos, tmp_path):
    config = read_settings(["data=photos", "source=photos", "probe=[photos,own.yaml,characters]"])
    assert (config.data, config.source) == (photos, photos)
    assert config.probe == [photos, str(tmp_path / "own.yaml"), "characters"]
    config = read_settings(["data=owner/name", "source=other/name"])
    assert (config.data, config.source) == ("owner/name", "other/name")


@pytest.mark.parametrize("key", ["data", "probe"])
def test_a_run_goes_on_whose_folder_was_named_from_where_it_was_called(key, photos, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    given, shown = ("photos", photos) if key == "data" else (["photos"], [photos])
    config = read_settings([])
    setattr(config, key, given)  # as of an earlier version
    (out / "config.yaml").write_text(to_yaml(config))
    word = f"{key}={shown}".replace("'", "")
    for words in ([], [word]):
        assert getattr(read_settings([f"out={out}", *words]), key) == shown
