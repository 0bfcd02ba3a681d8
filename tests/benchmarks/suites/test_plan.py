"""The plan of a suite: which runs fill its cells."""

import re
from dataclasses import replace

import pytest
from results_files import write_results_file

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.methods.method import compared_methods, find_method
from cl_merge.benchmarks.runs.settings import check_same_run
from cl_merge.benchmarks.suites.definition import find_suite, narrowed, to_yaml
from cl_merge.benchmarks.suites.plan import (
    BEGUN,
    DONE,
    FAILED,
    NEW,
    job_config,
    jobs_of,
    make_plan,
    on_devices,
    state_of,
)
from cl_merge.config.reading import to_yaml as config_yaml
from cl_merge.data.tasks import resolve_order
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow


def plan(suite="offline", **choice):
    return make_plan(narrowed(find_suite(suite), **choice))


def test_methods_that_share_a_training_share_a_run():
    cells = plan(data=["digits"])
    trainings = {cell.job.training for cell in cells}
    assert trainings == {"sequential", "independent", "lwf", "ewc", "joint"}
    assert len(jobs_of(cells)) == len(trainings)
    for cell in cells:
        method = find_method(cell.method)
        assert method.training in (None, cell.job.training)
        assert method.training is None or cell.method in cell.job.methods


def test_every_cell_has_a_job_that_evaluates_it():
    cells = plan("table1", seeds="2")
    assert len(cells) == 14 * 10 * 2
    assert len({(c.setting, c.method, c.seed) for c in cells}) == len(cells)


def test_joint_training_serves_every_number_of_tasks_whichever_is_asked_for():
    places = {c.job.path for c in plan("table1", data=["cars"], methods=["joint"])}
    assert places == {"cars/seed5/joint"}
    (all_tasks,) = jobs_of(plan("table1", data=["cars"], methods=["joint"]))
    (twenty,) = jobs_of(plan("table1", data=["cars"], tasks=[20], methods=["joint"]))
    assert all_tasks.config == twenty.config


def test_joint_training_that_was_begun_keeps_its_number_of_tasks(tmp_path):
    choice = {"data": ["cifar100"], "methods": ["joint", "magmax"]}
    suite = find_suite("offline")
    (five, *_) = jobs_of(make_plan(narrowed(suite, **choice, tasks=[5])))
    (tmp_path / five.path).mkdir(parents=True)
    (tmp_path / five.path / "config.yaml").write_text(config_yaml(job_config(five)))
    later = narrowed(suite, **choice, tasks=[10])
    (ten, *_) = jobs_of(make_plan(later))
    (same, *_) = jobs_of(make_plan(later, tmp_path))
    assert [job.config["stream"]["tasks"] for job in (five, ten, same)] == [5, 10, 5]
    check_same_run(job_config(same), tmp_path / five.path / "config.yaml")


def test_joint_training_needs_settings_of_a_data_set_that_differ_in_evaluate_alone():
    (joint,) = jobs_of(plan("offline", data=["caltech101"], methods=["joint"]))
    assert "evaluate" not in joint.config
    suite = narrowed(find_suite("offline"), data=["caltech101"], methods=["joint"])
    first, *rest = suite.settings
    other = replace(suite, settings=(replace(first, run={"epochs": [1]}), *rest))
    with pytest.raises(InputError, match="settings of caltech101 differ in run, but share one"):
        make_plan(other)


def test_zero_shot_needs_no_run_of_its_own():
    jobs = jobs_of(plan(data=["digits"], methods=["zero-shot", "ties"]))
    assert [job.training for job in jobs] == ["independent"]
    (fisher,) = jobs_of(plan(data=["digits"], methods=["zero-shot", "fisher"]))
    assert fisher.methods == ("fisher",)


@pytest.mark.parametrize("others", [[], ["joint"]])
def test_zero_shot_alone_trains_nothing(others, tmp_path):
    (job, *_) = jobs_of(plan("table1", data=["cars"], tasks=[5], methods=["zero-shot", *others]))
    config = job_config(job)
    assert job.path == "cars-5/seed5/sequential-zero-shot"
    assert (config.method, config.compare) == ("zero-shot", [])
    # Where a run has finished, it has evaluated zero-shot.
    done = tmp_path / "cars-5/seed5/ewc"
    done.mkdir(parents=True)
    write_results_file(done, {"methods": {"ewc": {}}})
    suite = narrowed(find_suite("table1"), data=["cars"], tasks=[5], methods=["zero-shot", *others])
    (job, *_) = jobs_of(make_plan(suite, tmp_path))
    assert job.training == "ewc"


def test_a_method_that_estimates_what_matters_has_a_run_of_its_own():
    jobs = jobs_of(plan(data=["digits"], methods=["fisher", "ties"]))
    assert [(job.path, job.methods[0]) for job in jobs] == [
        ("digits-5/seed0/independent-fisher", "fisher"),
        ("digits-5/seed0/independent", "max-abs"),
    ]
    assert "fisher" not in jobs[1].methods


def test_published_options_reach_the_methods_and_only_them():
    (job,) = jobs_of(plan("table1", data=["cars"], tasks=[10], methods=["ties"]))
    config = job_config(job)
    assert config.method != "ties"
    assert config.merge.beside == {"ties": {"density": 0.3472}}
    (alone,) = jobs_of(plan("offline", data=["digits"], methods=["ties"]))
    assert job_config(alone).merge.beside == {}


def test_the_seed_of_a_run_is_that_of_its_cell_and_reaches_the_recipe():
    (job,) = jobs_of(plan(data=["caltech101"], tasks=[10], methods=["magmax"], seeds="3,"))
    config = job_config(job)
    assert (config.seed, config.stream.order, config.stream.tasks) == (3, 3, 10)


@pytest.mark.parametrize("suite", ["offline", "table1", "table2", "domains", "vision8"])
def test_every_run_of_every_suite_has_a_valid_configuration(suite):
    for job in jobs_of(plan(suite)):
        assert job_config(job).data == job.setting.data


def test_several_devices_share_the_batch_of_one():
    (job,) = jobs_of(plan("table1", data=["cars"], tasks=[10], methods=["magmax"]))
    config = job_config(on_devices(job, 8))
    assert config.stream.batch_size == 16  # 128 in all, as published
    assert config.trainer["devices"] == 8
    assert config.trainer["strategy"] == "ddp"
    with pytest.raises(InputError, match="^ddp 3: cars-10/seed5/sequential trains on batches of"):
        on_devices(job, 3)


def test_the_folder_tells_how_far_a_job_is(tmp_path):
    (job,) = jobs_of(plan(data=["digits"], methods=["joint"]))
    place = tmp_path / job.path
    assert state_of(job, tmp_path) == NEW
    place.mkdir(parents=True)
    (place / "journal.jsonl").touch()
    assert state_of(job, tmp_path) == BEGUN
    (place / "failed.json").write_text("{}")
    assert state_of(job, tmp_path) == FAILED
    write_results_file(place, {"methods": {"joint": {}}})
    assert state_of(job, tmp_path) == DONE


def test_results_without_a_method_that_is_asked_for_are_not_the_end(tmp_path):
    (job,) = jobs_of(plan(data=["digits"], methods=["opcm"]))
    place = tmp_path / job.path
    place.mkdir(parents=True)
    (place / "journal.jsonl").touch()
    others = {name: {} for name in job.methods if name != "opcm"}
    write_results_file(place, {"methods": others})
    assert state_of(job, tmp_path) == BEGUN


@pytest.mark.parametrize(
    ("suite", "methods"),
    [
        ("table1", ["lwf", "lwf-magmax"]),
        ("offline", ["fisher", "opcm"]),
        ("{tmp}/own.yaml", ["sequential", "magmax"]),
    ],
)
def test_a_run_that_was_begun_keeps_its_method_when_others_join(suite, methods, tmp_path):
    (tmp_path / "own.yaml").write_text("settings: [{data: digits}]\nmethods: [sequential]")
    suite = suite.format(tmp=tmp_path)
    for number in range(1, len(methods) + 1):
        asked = narrowed(find_suite(suite), data=["digits"], methods=methods[:number])
        for job in jobs_of(make_plan(asked, tmp_path)):
            file = tmp_path / job.path / "config.yaml"
            config = job_config(job)
            if file.exists():
                check_same_run(config, file)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(config_yaml(config))
            assert set(job.methods) <= {
                method.name for method in compared_methods(config.method, config.compare)
            }


def test_a_wrong_setting_names_the_run():
    (job,) = jobs_of(plan(data=["digits"], methods=["joint"], run=["optimizer.lrr=1"]))
    message = "digits/seed0/joint: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"
    with pytest.raises(InputError, match=re.escape(message)):
        job_config(job)


def test_orders_have_runs_of_their_own_and_joint_training_serves_all():
    jobs = jobs_of(plan(data=["digits"], methods=["magmax", "joint"], orders=3))
    assert [job.path for job in jobs] == [
        "digits-5/seed0/sequential",
        "digits/seed0/joint",
        "digits-5-order1/seed0/sequential",
        "digits-5-order2/seed0/sequential",
    ]
    assert [job_config(job).stream.order for job in jobs] == ["natural", "natural", 1, 2]
    with pytest.raises(InputError, match="^orders 0; expected how many, 1 or more"):
        plan(data=["digits"], orders=0)


@pytest.mark.parametrize("data", ["mtil", "mtil-2"])
def test_joined_data_sets_keep_their_epochs_in_any_order(data):
    sources = find_data(data).sources
    by_source = dict(zip(sources, find_data("mtil").recipe["epochs"], strict=True))
    for job in jobs_of(plan("mtil", data=[data], methods=["magmax"], orders=3)):
        config = job_config(job)
        order = resolve_order(config.stream.order, sources, "source")
        assert config.epochs == [by_source[sources[index]] for index in order]


def test_epochs_by_task_that_say_no_data_set_are_refused_in_other_orders():
    words = ["epochs=[1,2,3,4,5]"]
    plan(data=["digits"], methods=["magmax"], run=words)
    with pytest.raises(InputError, match="^orders: 'digits' has epochs for each task"):
        plan(data=["digits"], methods=["magmax"], run=words, orders=2)


def test_a_suite_with_orders_is_read_back_from_its_file(tmp_path):
    suite = narrowed(find_suite("offline"), data=["digits"], orders=2)
    (tmp_path / "suite.yaml").write_text(to_yaml(suite))
    assert find_suite(str(tmp_path / "suite.yaml")).settings == suite.settings
