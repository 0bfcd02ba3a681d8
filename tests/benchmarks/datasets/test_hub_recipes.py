"""Every recipe of the catalog, read by the real clients from a hub that is laid out as the real one."""

import re
from dataclasses import asdict

import pytest
from fake_hub import FakeHub, use_hub
from hub_repositories import LAYOUTS, hub_recipes, repository

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import load_data, read_class_names
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.data.tables import parts_of, splits_read
from cl_merge.data.task_stream import TaskStream


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = FakeHub()
    with made.serving():
        use_hub(monkeypatch, made.endpoint, tmp_path / "cache")
        yield made


def test_there_is_a_repository_for_every_recipe():
    assert sorted(LAYOUTS) == hub_recipes()


@pytest.mark.parametrize("name", hub_recipes())
def test_a_recipe_reads_its_splits_from_the_hub_and_makes_its_tasks(name, hub):
    hub.add(repository(name))
    config, facts = read_settings([f"data={name}"]), find_data(name).facts
    loaded = load_data(config)
    assert loaded.revision.startswith(config.stream.revision or "")
    assert re.fullmatch("[0-9a-f]{40}", loaded.revision)
    stream = TaskStream(loaded.splits, **asdict(config.stream) | dict(loaded.columns))
    assert len(stream.class_names) == facts["classes"]
    assert len(stream.tasks) == config.stream.tasks or config.stream.scenario == "domain"
    worded = read_class_names(config.class_names, stream.class_names)
    assert len(set(worded)) == facts["classes"]
    assert not any("_" in word for word in worded) or name == "cifar100"
    stream_of = config.stream
    used = splits_read(stream_of.train_split, stream_of.test_split, stream_of.test_fraction)
    sent = {file.split("/")[-1].split("-")[0] for file in hub.sent if file.endswith(".parquet")}
    assert sent == set(parts_of(used))


def test_domains_are_read_off_the_names_of_files(hub):
    hub.add(repository("imagenet-r"))
    config = read_settings(["data=imagenet-r-domains"])
    loaded = load_data(config)
    stream = TaskStream(loaded.splits, **asdict(config.stream))
    assert [task.name for task in stream.tasks] == config.stream.order


def test_mtil_has_the_same_sets_in_two_orders_each_with_its_own_epochs():
    first, second = find_data("mtil"), find_data("mtil-2")
    order = second.recipe["stream"]["order"]
    assert set(first.sources) == set(second.sources) == set(order)
    epochs = dict(zip(first.sources, first.recipe["epochs"], strict=True))
    assert second.recipe["epochs"] == [epochs[name] for name in order]
    assert set(find_data("x-tail").sources) == {*first.sources} - {"cifar100"}
    for name in ("mtil", "x-tail"):
        entry = find_data(name)
        classes = sum(find_data(source).facts["classes"] for source in entry.sources)
        assert entry.facts == {"classes": classes, "tasks": len(entry.sources)}


@pytest.mark.slow
def test_recipes_are_joined_with_their_columns_and_unions_of_splits(hub, tmp_path):
    for name in ("flowers102", "svhn"):
        hub.add(repository(name))
    (tmp_path / "two.yaml").write_text("sources: [flowers102, svhn]\nstream: {scenario: source}\n")
    loaded = load_data(read_settings([f"data={tmp_path}/two.yaml"]))
    stream = TaskStream(loaded.splits, scenario="source", **dict(loaded.columns))
    assert [len(task.train) for task in stream.tasks] == [2 * 102, 10]
    assert set(loaded.revision) == {"flowers102", "svhn"}
