"""Finished runs are found by their folders."""

import json

import pytest
from case_suite import make_run, make_suite, make_vectors

from cl_merge.benchmarks.reports.figures.suite_runs import find_settings
from cl_merge.errors import InputError


def test_settings_are_sorted_by_data_and_tasks_with_runs_by_seed_and_training(tmp_path):
    make_suite(tmp_path, setting="birds-10", tasks=10, seeds=2)
    make_suite(tmp_path, setting="birds-5", tasks=5, seeds=1)
    make_suite(tmp_path, setting="ants", tasks=4, seeds=1)
    found = find_settings(tmp_path)
    assert [setting.name for setting in found] == ["ants", "birds-5", "birds-10"]
    assert [(run.seed, run.training) for run in found[2].runs] == [
        (0, "sequential"),
        (0, "independent"),
        (1, "sequential"),
        (1, "independent"),
    ]
    assert found[2].title == "birds in 10 tasks"


def test_joint_training_serves_all_settings_of_its_data_set(tmp_path):
    make_suite(tmp_path, setting="birds-5", tasks=5, seeds=1)
    make_suite(tmp_path, setting="ants", tasks=2, seeds=1)
    make_run(tmp_path, "birds", "joint", tasks=2)
    make_run(tmp_path, "ants", "joint", tasks=2)
    ants, birds = find_settings(tmp_path)
    assert [run.folder.parent.parent.name for run in birds.joint] == ["birds"]
    assert [run.folder.parent.parent.name for run in ants.joint] == ["ants"]
    assert "joint" in birds.methods()
    assert "joint" not in birds.methods(joint=False)
    # The zero-shot matrix of joint training may be of another number of tasks.
    assert len(birds.methods()["zero-shot"][0]["matrix"][0]) == 5


def test_numbers_and_orders_in_names_of_settings_are_not_taken_for_numbers_of_tasks(tmp_path):
    make_suite(tmp_path, setting="imagenet-100", tasks=3, seeds=1)
    make_suite(tmp_path, setting="birds-3", tasks=3, seeds=1)
    make_suite(tmp_path, setting="birds-3-order2", tasks=3, seeds=1)
    make_run(tmp_path, "imagenet", "joint")
    make_run(tmp_path, "birds", "joint")
    found = {setting.name: setting for setting in find_settings(tmp_path)}
    assert found["imagenet-100"].title == "imagenet-100 in 3 tasks"
    assert not found["imagenet-100"].joint
    assert found["birds-3-order2"].title == "birds in 3 tasks, order 2"
    assert found["birds-3-order2"].joint == found["birds-3"].joint != ()


def test_a_run_of_one_method_alone_is_there_too(tmp_path):
    make_suite(tmp_path, seeds=1)
    make_run(tmp_path, "birds-3", "lwf").rename(tmp_path / "birds-3/seed0/independent-fisher")
    (setting,) = find_settings(tmp_path)
    names = ["sequential", "independent", "independent-fisher"]
    assert [run.training for run in setting.runs] == names
    assert "lwf-magmax" in setting.methods()
    assert not setting.runs[-1].merging  # measured with those of its training


def test_what_several_runs_of_a_seed_hold_counts_once(tmp_path):
    make_suite(tmp_path, seeds=2)
    (setting,) = find_settings(tmp_path)
    methods = setting.methods()
    assert list(methods)[:2] == ["zero-shot", "sequential"]
    assert {name: len(results) for name, results in methods.items()} == dict.fromkeys(methods, 2)


def test_runs_that_have_not_finished_and_other_folders_are_passed_over(tmp_path):
    make_suite(tmp_path, seeds=1)
    (tmp_path / "birds-3/seed0/lwf").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "birds-3/seed0/notes").mkdir()
    (tmp_path / "birds-3/seed0/notes/results.json").write_text("{}")
    (setting,) = find_settings(tmp_path)
    assert [run.training for run in setting.runs] == ["sequential", "independent"]


def test_vectors_come_in_the_order_of_the_tasks(tmp_path):
    make_suite(tmp_path, setting="birds-12", tasks=12, seeds=1)
    run = find_settings(tmp_path)[0].runs[0]
    assert list(run.vectors()) == make_vectors(12)


def test_missing_vectors_are_named(tmp_path):
    make_suite(tmp_path, seeds=1)
    run = find_settings(tmp_path)[0].runs[0]
    run.check_vectors()
    run.vector_files[1].unlink()
    with pytest.raises(InputError, match=r"sequential' does not hold the 3 task vectors"):
        run.check_vectors()


def test_the_fingerprint_changes_with_the_results(tmp_path):
    folder = make_run(tmp_path, "birds-3", "sequential")
    before = find_settings(tmp_path)[0].runs[0].fingerprint
    results = json.loads((folder / "results.json").read_text())
    assert find_settings(tmp_path)[0].runs[0].fingerprint == before
    (folder / "results.json").write_text(json.dumps(results | {"seed": 1}))
    assert find_settings(tmp_path)[0].runs[0].fingerprint != before
