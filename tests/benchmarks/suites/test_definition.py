"""Suites: what they are read from, and what of them is chosen."""

import re
from dataclasses import replace

import pytest

from cl_merge.benchmarks.methods.method import compared_methods
from cl_merge.benchmarks.suites.definition import (
    Setting,
    find_suite,
    joined,
    known_suites,
    narrowed,
    to_yaml,
)
from cl_merge.errors import InputError


@pytest.mark.parametrize("name", known_suites())
def test_every_suite_is_valid_and_survives_writing(name, tmp_path):
    suite = find_suite(name)
    assert suite.about
    assert suite.settings
    assert suite.methods
    assert suite.seeds
    (tmp_path / "suite.yaml").write_text(to_yaml(suite))
    again = find_suite(str(tmp_path / "suite.yaml"))
    assert again == suite
    assert [s.joint_tasks for s in again.settings] == [s.joint_tasks for s in suite.settings]


def test_the_first_table_is_the_papers():
    suite = find_suite("table1")
    assert len(suite.settings) == 14  # Cars and CUB-200 have no fifty tasks
    assert len(suite.methods) == 10
    assert suite.seeds == (5,)  # the one of the published runs
    assert suite.published


def test_a_part_of_a_suite_is_chosen():
    part = narrowed(
        find_suite("table1"),
        data=["cifar100"],
        tasks=[10],
        methods=["magmax", "ties"],
        seeds="3",
        run=["trainer.max_epochs=1"],
    )
    assert [setting.name for setting in part.settings] == ["cifar100-10"]
    assert part.shown == ("magmax", "ties")
    assert part.seeds == (5, 6, 7)
    assert part.run == {"trainer": {"max_epochs": 1}}


def test_a_number_of_seeds_counts_from_the_first_and_a_list_is_taken_as_it_is():
    suite = find_suite("offline")
    assert narrowed(suite, seeds="2").seeds == (0, 1)
    assert narrowed(suite, seeds="7,3").seeds == (7, 3)
    assert narrowed(suite, seeds="4,").seeds == (4,)


def test_other_data_and_methods_can_be_added():
    part = narrowed(
        find_suite("offline"), data=["/photos/birds"], tasks=[4], methods=["opcm", "magmax"]
    )
    assert [(s.data, s.tasks, s.name) for s in part.settings] == [("/photos/birds", 4, "birds-4")]
    assert part.methods[-1] == "opcm"
    assert part.shown == ("opcm", "magmax")


def test_a_file_of_a_data_set_is_called_by_its_stem(tmp_path, monkeypatch):
    (tmp_path / "cifar10.yaml").write_text("extends: cifar100\nsource: uoft-cs/cifar10\n")
    monkeypatch.chdir(tmp_path)
    for given in ("cifar10.yaml", str(tmp_path / "cifar10.yaml")):
        (setting,) = narrowed(find_suite("offline"), data=[given], tasks=[5]).settings
        assert setting.name == "cifar10-5"
        assert setting.data_name == "cifar10"


def test_a_suite_is_read_back_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "own.yaml").write_text("source: photos")
    file = tmp_path / "mine.yaml"
    file.write_text("settings: [{data: own.yaml}, {data: photos}]\nmethods: [magmax]")
    monkeypatch.chdir(tmp_path)
    suite = find_suite("mine.yaml")
    (photos,) = narrowed(suite, data=["photos"]).settings
    assert photos == suite.settings[1]
    file.write_text(to_yaml(suite))
    monkeypatch.chdir("/")
    assert find_suite(str(file)) == suite


def test_the_numbers_of_tasks_that_a_data_set_lacks_leave_the_others():
    part = narrowed(find_suite("table1"), tasks=[50])
    assert [setting.name for setting in part.settings] == ["cifar100-50", "imagenet-r-50"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"data": ["cifar10"]}, "unknown data set 'cifar10'; did you mean 'cifar100'?"),
        ({"methods": ["magmx"]}, "unknown method 'magmx'; did you mean 'magmax'?"),
        ({"data": ["cars"], "tasks": [50]}, "tasks 50: suite 'table1' has 'cars' in 5, 10, 20"),
        ({"tasks": [7]}, "nothing is left of suite 'table1', which has cifar100-5"),
        ({"seeds": "many"}, "seeds 'many'; expected how many"),
        ({"seeds": "0"}, "seeds '0'; expected how many"),
        ({"seeds": "-1,2"}, "seeds '-1,2'; expected how many"),
        ({"run": ["seed=3"]}, "'seed=3': a suite decides seed for each of its runs"),
        ({"run": ["stream.tasks=3"]}, "'stream.tasks=3': a suite decides stream.tasks"),
    ],
)
def test_what_cannot_be_chosen_is_said(choice, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        narrowed(find_suite("table1"), **choice)


@pytest.mark.parametrize(
    ("run", "key"), [("seed: 3", "seed"), ("stream: {tasks: 5}", "stream.tasks")]
)
@pytest.mark.parametrize("of", ["suite", "setting"])
def test_what_a_suite_decides_stands_in_no_run_of_its_file(run, key, of, tmp_path):
    own, every = ("", f"run: {{{run}}}") if of == "suite" else (f", run: {{{run}}}", "")
    file = tmp_path / "mine.yaml"
    file.write_text(f"settings: [{{data: digits{own}}}]\nmethods: [magmax]\n{every}")
    with pytest.raises(InputError, match=f"run of suite 'mine': a suite decides {key} for each"):
        narrowed(find_suite(str(file)))


def test_a_data_set_whose_domains_are_its_tasks_has_no_number_of_them_to_choose():
    message = "^tasks 5: suite 'offline' has 'pacs' in the tasks that its recipe makes$"
    with pytest.raises(InputError, match=message):
        narrowed(find_suite("offline"), data=["digits", "pacs"], tasks=[5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: []\nmethods: [magmax]", "'settings' must be a list with at least one entry"),
        ("settings: [{data: digits}]", "'methods' must be a list with at least one entry"),
        ("setting: [{data: digits}]", "unknown key 'setting'; did you mean 'settings'?"),
        ("settings: [{date: digits}]\nmethods: [magmax]", "each setting needs data: NAME"),
        ("settings: [{data: digit}]\nmethods: [magmax]", "did you mean 'digits'?"),
        ("settings: [{data: digits, task: 5}]\nmethods: [magmax]", "did you mean 'tasks'?"),
        ("settings: [{data: digits, tasks: five}]\nmethods: [magmax]", "tasks of 'digits' must be"),
        ("settings: [{data: digits}]\nmethods: [tie]", "did you mean 'ties'?"),
        ("settings: [{data: digits}]\nmethods: [ties]\npaper: table3", "did you mean 'table"),
        (
            "settings: [{data: digits}]\nmethods: [ties]\nseeds: 3",
            "Expected `array`, got `int` - at",
        ),
        ("settings: [{data: digits}]\nmethods: [ties]\nseeds: [-1]", "Expected `int` >= 0"),
        ("settings: [{data: digits}]\nmethods: [ties]\nrun: fast", "got `str` - at `$.run`"),
        ("settings: [{data: digits, run: fast}]\nmethods: [ties]", "got `str` - at `$.run`"),
    ],
)
def test_a_wrong_file_is_answered_with_what_is_wrong(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        find_suite(str(file))


TWICE = "settings:\n  - {{data: {}, tasks: 2, {}}}\n  - {{data: {}, tasks: 2}}\nmethods: [magmax]"


@pytest.mark.parametrize(
    ("data", "run", "name"),
    [
        (("digits", "digits"), "run: {epochs: [1]}", "digits-2"),
        (("/a/photos", "/b/photos"), "", "photos-2"),
        (("/a/x.v1", "/b/x.v1"), "", "x.v1-2"),
    ],
)
def test_two_settings_of_one_name_are_refused_without_a_label(data, run, name, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(TWICE.format(data[0], run, data[1]))
    with pytest.raises(InputError, match=f"two settings are called '{name}'"):
        find_suite(str(file))
    file.write_text(TWICE.format(data[0], f"label: other, {run}", data[1]))
    suite = find_suite(str(file))
    assert [setting.name for setting in suite.settings] == ["other-2", name]
    # Asked for one after the other they would share a folder, too.
    one, two = (replace(suite, settings=(replace(s, label=None),)) for s in suite.settings)
    with pytest.raises(InputError, match=f"two settings are called '{name}'"):
        joined(one, two)


def test_an_unknown_suite_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="unknown suite 'tabel1'; did you mean 'table1'"):
        find_suite("tabel1")


def test_what_two_commands_asked_for_is_put_together():
    suite = find_suite("offline")
    one = narrowed(suite, data=["digits"], methods=["ties"], seeds="1")
    two = narrowed(suite, data=["pacs"], methods=["magmax"], seeds="2")
    both = joined(one, two)
    assert both.settings == (Setting("digits", 5), Setting("pacs"))
    assert both.shown == ("magmax", "ties")  # in the order of the table
    assert both.seeds == (0, 1)


def test_two_data_sets_do_not_share_a_run_of_joint_training(tmp_path):
    file, text = tmp_path / "mine.yaml", "settings: [{data: %s, tasks: 2}, {data: %s, tasks: 5}]\n"
    file.write_text(text % ("/a/birds", "/b/birds") + "methods: [joint]\n")
    with pytest.raises(InputError, match="two settings are called 'birds'"):
        find_suite(str(file))
    file.write_text(text % ("/a/birds", "/a/birds") + "methods: [joint]\n")
    assert [setting.name for setting in find_suite(str(file)).settings] == ["birds-2", "birds-5"]


def test_what_is_asked_for_twice_stands_in_the_table_once():
    suite = narrowed(
        find_suite("offline"),
        data=["digits", "digits"],
        methods=["ties-independent", "ties", "fisher", "fisher-independent"],
    )
    assert [setting.name for setting in suite.settings] == ["digits-5"]
    assert [method.name for method in suite.rows] == ["ties", "fisher"]
    again = joined(suite, narrowed(suite, methods=["ties"]))
    assert [method.name for method in again.rows] == ["ties", "fisher"]


def test_methods_of_ones_own_with_one_name_are_refused(tmp_path):
    for name in "ab":
        text = "from cl_merge.mergers import Average\n\nclass M(Average):\n    name = 'median'\n"
        (tmp_path / f"{name}.py").write_text(text)
    both = [f"{tmp_path / name}.py:M" for name in "ab"]
    with pytest.raises(InputError, match=r"a.py:M' are both called 'median'"):
        narrowed(find_suite("offline"), methods=both)
    with pytest.raises(InputError, match=r"a.py:M' are both called 'median'"):
        compared_methods("magmax", both)
