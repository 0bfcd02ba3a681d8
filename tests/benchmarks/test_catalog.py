"""The catalog of data sets and the methods of a run."""

import re

import pytest

from cl_merge.benchmarks.catalog import catalog, find_data, open_data
from cl_merge.benchmarks.methods import (
    METHODS,
    Method,
    find_method,
    methods_beside,
    published_scale,
)
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


def test_every_merger_has_a_training_and_may_be_given_the_other():
    assert find_method("iso-c").training == "independent"
    assert find_method("opcm").training == "sequential"
    assert find_method("opcm-independent") == Method("opcm-independent", "independent", "opcm")
    assert find_method("iso-c-sequential") == Method("iso-c-sequential", "sequential", "iso-c")
    assert find_method("max-abs-sequential").training == "sequential"
    for same in ("ties-independent", "magmax-sequential"):
        assert find_method(same) is METHODS[same.rpartition("-")[0]]
    assert find_method("opcm-sequential") == find_method("opcm")


OWN = """
from cl_merge import merge_method

@merge_method("own-median", scale=0.7)
def median(values, *, lower: bool = True):
    return values.median(dim=0).values
"""


def test_a_method_of_ones_own_is_found_in_its_file_and_called_by_its_name(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    place = f"{tmp_path}/own.py:median"
    method = find_method(place)
    assert (method.name, method.training, method.options) == (
        "own-median",
        "independent",
        ["lower"],
    )
    assert published_scale(method) == 0.7
    other = find_method(f"{place}-sequential")
    assert (other.name, other.training) == ("own-median-sequential", "sequential")
    shown = methods_beside(place, ["ties", f"{place}-sequential"])
    assert [m.name for m in shown] == ["zero-shot", "ties", "own-median", "own-median-sequential"]
    assert [m.name for m in methods_beside(place, "all")] == [*METHODS, "own-median"]


def test_a_method_of_ones_own_may_not_be_called_as_another(tmp_path):
    (tmp_path / "thief.py").write_text(
        "from cl_merge.mergers import Average\nclass Mine(Average):\n    name = 'ties'\n"
    )
    with pytest.raises(InputError, match="calls itself 'ties', which is the name of another"):
        find_method(f"{tmp_path}/thief.py:Mine")


def test_the_file_of_a_method_is_named_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    config = read_settings(["method=own.py:median", "compare=[ties, own.py:median-sequential]"])
    place = f"{tmp_path.resolve()}/own.py:median"
    assert config.method == place
    assert config.compare == ["ties", f"{place}-sequential"]


def test_methods_that_weigh_elements_cannot_be_shown_beside_another(tmp_path):
    (tmp_path / "weighing.py").write_text(
        "from cl_merge.mergers import Average\n"
        "class Weighing(Average):\n    name = 'weighing'\n    weighted = True\n"
    )
    place = f"{tmp_path}/weighing.py:Weighing"
    assert [m.name for m in methods_beside(place, ["ties"])] == ["zero-shot", "ties", "weighing"]
    with pytest.raises(InputError, match="'weighing' weighs the elements of each task vector"):
        methods_beside("ties", [place])
