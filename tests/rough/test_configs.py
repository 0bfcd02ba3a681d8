"""Whatever is written on the command line or into a file of settings: read, or one clear error."""

import random

import pytest
import yaml
from damage import SEEDS, complaint, damaged_bytes, edited

from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.config.reading import to_yaml
from cl_merge.config.schema import RunConfig, described_keys
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow

VALUES = ["", "null", "true", "-1", "0.5", "nan", "1e400", "9" * 30, "x", "${seed}", "${x}", "???"]
VALUES += [
    "[]",
    "[[1]]",
    "[null]",
    "{}",
    "{1: {2: 3}}",
    "'\u202e'",
    "[",
    "{a: ",
    "*a",
    "&*!python/x",
]


@pytest.mark.parametrize("key", ["trainer", "merge.options", "merge.beside"])
def test_what_a_setting_refers_to_is_of_its_type(key):
    with pytest.raises(InputError, match=f"^what a setting refers to: {key}: Cannot assign int to"):
        read_settings([f"{key}=${{seed}}"])


@pytest.mark.parametrize("key", described_keys())
def test_any_value_of_any_key_is_read_or_one_line(key):
    for value in random.Random(key).sample(VALUES, 8):
        assert "\n" not in complaint(lambda value=value: read_settings([f"{key}={value}"]))
    assert "\n" not in complaint(lambda: read_settings([f"{key}.inner=1"]))


def test_words_of_random_characters_are_read_or_one_line():
    for seed in SEEDS:
        draw = random.Random(seed)
        letters = "abcs.=[]{}'\"$:,*&*#%|>-\t\0é\u202e 01" + draw.choice(list(described_keys()))
        word = "".join(draw.choices(letters, k=draw.randrange(20)))
        for words in ([word], [f"trainer.{word}"], [f"prompts={word}"]):
            assert "\n" not in complaint(lambda words=words: read_settings(words))


def test_damaged_files_of_settings_are_read_or_one_line(tmp_path):
    file = tmp_path / "settings.yaml"
    whole = to_yaml(RunConfig())
    refused = 0
    for seed in SEEDS:
        file.write_bytes(damaged_bytes(whole.encode(), random.Random(seed)))
        said = complaint(lambda: read_settings([], file))
        assert "\n" not in said
        assert str(file) in said or not said.startswith("config")
        refused += bool(said)
    assert refused > len(SEEDS) / 4


def test_edited_files_of_settings_are_read_or_one_line(tmp_path):
    file = tmp_path / "settings.yaml"
    settings = yaml.safe_load(to_yaml(RunConfig(data="digits")))
    refused = 0
    for seed in SEEDS:
        file.write_text(yaml.safe_dump(edited(settings, random.Random(seed))), encoding="utf-8")
        said = complaint(lambda: read_settings([], file))
        assert "\n" not in said
        refused += bool(said)
    assert refused > len(SEEDS) / 4
