"""The catalog of data sets and the methods of a run."""

import re

import pytest

from cl_merge.benchmarks.catalog import catalog, find_data, open_data
from cl_merge.benchmarks.methods import METHODS, find_method, methods_beside, published_scale
from cl_merge.benchmarks.settings import read_settings
from cl_merge.errors import InputError


@pytest.mark.parametrize("name", catalog())
def test_every_recipe_is_a_valid_configuration(name):
    config = read_settings([f"data={name}"])
    assert config.data == name
    assert find_data(name).about
    assert all("{}" in prompt for prompt in config.prompts)


def test_digits_come_without_a_network():
    splits = open_data(find_data("digits").source)
    assert set(splits) == {"train", "test"}
    assert sum(map(len, splits.values())) == 1797


def test_the_recipe_yields_to_a_file_and_the_file_to_words(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: digits\nstream: {tasks: 2}\nseed: 4\n")
    config = read_settings(["seed=5"], file)
    assert (config.data, config.stream.tasks, config.seed) == ("digits", 2, 5)
    assert config.optimizer == read_settings([]).optimizer


def test_a_path_or_a_hub_id_needs_no_recipe(tmp_path):
    assert find_data(str(tmp_path)).recipe == {}
    assert find_data("uoft-cs/cifar100").source == "uoft-cs/cifar100"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=digit"], "unknown data set 'digit'; did you mean 'digits'? Known: "),
        (["method=magmx"], "unknown method 'magmx'; did you mean 'magmax'? Known: zero-shot, "),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(words, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read_settings(words)


def test_the_methods_of_the_table_are_those_of_the_paper_and_their_sequential_twins():
    assert list(METHODS) == [
        "zero-shot",
        "joint",
        "sequential",
        "independent",
        "lwf",
        "ewc",
        "magmax",
        "lwf-magmax",
        "ewc-magmax",
        "max-abs",
        "average",
        "task-arithmetic",
        "random-mix",
        "ties",
        "average-sequential",
        "task-arithmetic-sequential",
        "random-mix-sequential",
        "ties-sequential",
    ]
    assert published_scale(find_method("magmax")) == 0.5
    assert published_scale(find_method("ties-sequential")) == 0.55
    assert published_scale(find_method("sequential")) is None


def test_what_is_shown_beside_a_method():
    def names(method, compare):
        return [found.name for found in methods_beside(method, compare)]

    plain = [name for name in METHODS if METHODS[name].training not in ("lwf", "ewc", "joint")]
    assert names("magmax", True) == plain
    assert names("magmax", False) == ["zero-shot", "magmax"]
    assert names("magmax", "all") == list(METHODS)
    assert set(names("ewc-magmax", True)) == {*plain, "ewc", "ewc-magmax"}
    assert names("ties", "joint") == names("ties", ["joint"]) == ["zero-shot", "joint", "ties"]
    with pytest.raises(InputError, match="unknown method 'jointly'; did you mean 'joint'"):
        names("ties", ["jointly"])
