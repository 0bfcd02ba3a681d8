"""What a run reads before it starts: images and their commit, words for the classes, epochs."""

import io
import json
import logging
import re
from dataclasses import asdict

import datasets
import numpy as np
import open_clip
import pytest
import torch
from fake_hub import FakeHub, Repository, use_hub
from hub_repositories import card
from PIL import Image

from cl_merge import cli, load_clip
from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import (
    load_data,
    read_class_names,
    read_prompts,
    task_epochs,
)
from cl_merge.benchmarks.runs.run import count_batches, start_run
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.config.reading import read_yaml
from cl_merge.config.schema import RunConfig
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import zero_shot_head

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def photos(count=6, names=("one", "seven")):
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(count)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    labels = [row % len(names) for row in range(count)]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


@pytest.fixture
def folder(tmp_path):
    """A user's data set of two, with prompts of their own, in a file of their own."""
    saved = datasets.DatasetDict({"train": photos(6), "test": photos(4)})
    saved.save_to_disk(tmp_path / "photos")
    (tmp_path / "photos.yaml").write_text(
        "source: photos\nprompts: ['the {}']\nclass_names: [letter a, letter b]\n"
    )
    (tmp_path / "both.yaml").write_text(
        "sources: [digits, photos.yaml]\n"
        "epochs: [2, 1]\n"
        "stream: {scenario: source, images_per_class: 2, batch_size: 4}\n"
        "optimizer: {lr: 1.0e-3, warmup_steps: 0}\n"
    )
    return tmp_path


def start(folder, *words):
    out = f"out={folder / 'run'}"
    run = start_run(
        read_settings([f"data={folder}/both.yaml", "trainer.accelerator=cpu", out, *words])
    )
    run.folder.release()
    return run


@pytest.mark.slow
def test_each_of_the_joined_data_sets_has_its_own_names_and_prompts(folder):
    run = start(folder)
    clip = load_clip("glyph")
    digits = find_data("digits")
    names = load_data(read_settings([])).splits["train"].features["label"].names
    expected = torch.cat(
        [
            zero_shot_head(clip, names, digits.recipe["prompts"]).weight,
            zero_shot_head(clip, ["letter a", "letter b"], "the {}").weight,
        ]
    )
    torch.testing.assert_close(run.model.head.weight, expected)
    assert [task.name for task in run.stream.tasks] == ["digits", "photos"]
    # The same name in two data sets is two classes.
    assert {"digits: one", "photos: one"} <= set(run.stream.class_names)


@pytest.mark.slow
def test_prompts_and_names_that_are_given_are_for_all_of_the_joined(folder):
    names = [f"number {index}" for index in range(12)]
    run = start(folder, "prompts=['a {}']", f"class_names={names}")
    expected = zero_shot_head(load_clip("glyph"), names, "a {}").weight
    torch.testing.assert_close(run.model.head.weight, expected)
    with pytest.raises(InputError, match="^class_names has 1 names, but the data set has 12"):
        start(folder, "class_names=[x]", f"out={folder}/other")


@pytest.mark.slow
def test_the_batches_of_every_task_count_for_its_own_epochs(folder):
    run = start(folder, "compare=false", "evaluate=last")
    # 20 digits in 5 batches twice, 4 photos in one batch once; 364 test images in 91 batches.
    assert count_batches(run) == 91 + 91 + 3 * (5 * 2 + 1)


@pytest.mark.slow
def test_a_stream_of_data_sets_runs_from_end_to_end(folder, capsys):
    words = [f"data={folder}/both.yaml", f"out={folder}/run", "compare=[sequential]"]
    words += ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]
    assert cli.main(["run", *words]) == 0
    log = (folder / "run" / "logs" / "journal.jsonl").read_text().splitlines()
    assert [r["steps"] for r in map(json.loads, log) if "steps" in r] == [10, 1]
    saved = read_yaml(folder / "run" / "config.yaml")
    assert saved["data"] == str(folder / "both.yaml")
    assert saved["stream"]["revision"] is None


@pytest.mark.slow
def test_epochs_that_do_not_fit_the_tasks_are_refused_before_anything_trains(folder):
    with pytest.raises(InputError, match="^epochs has 3 numbers, but the stream has 2 tasks"):
        start(folder, "epochs=[1,2,3]")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("source=/photos", "source=/photos, but 'both' joins several data sets"),
        ("stream.revision=abc", "stream.revision=abc, but 'both' joins several data sets"),
    ],
)
def test_settings_for_one_data_set_are_refused_for_several(folder, word, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        start(folder, word)


def test_a_local_copy_of_each_kind_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_MERGE_DATA", str(tmp_path))
    splits = {"train": photos(6), "test": photos(4)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "mnist")
    for name, rows in splits.items():
        (tmp_path / "svhn").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "svhn" / f"{name}-00000.parquet")
        for number, row in enumerate(rows):
            path = tmp_path / "dtd" / name / f"class{row['label']}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    for name in ("mnist", "svhn", "dtd"):
        config = read_settings([f"data={name}"])
        loaded = load_data(config)
        assert [len(loaded.splits[split]) for split in ("train", "test")] == [6, 4]
        # The commit stays as it is: a local copy says nothing of it.
        assert loaded.revision == config.stream.revision
        explicit = load_data(read_settings([f"data={name}", f"source={tmp_path / name}"]))
        assert len(explicit.splits["train"]) == 6


def test_without_the_hub_one_line_says_how_to_use_a_local_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CL_MERGE_DATA", raising=False)
    assert cli.main(["run", "data=mnist", f"out={tmp_path}/run"]) == 2
    found = capsys.readouterr()
    message = (found.out + found.err).strip()
    assert "\n" not in message
    for part in ("ylecun/mnist", "source=/path/to/mnist", "CL_MERGE_DATA", "'mnist'"):
        assert part in message
    with pytest.raises(InputError, match=r"set CL_MERGE_DATA to the folder that holds cars/") as e:
        load_data(read_settings(["data=vision8"]))
    assert "source=" not in str(e.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set."""
    features = photos().features
    files = {f"data/{split}-0.parquet": as_parquet(photos(8)) for split in ("train", "test")}
    files["README.md"] = card([("default", "data", {"train": 8, "test": 8}, features)])
    made = FakeHub()
    made.add(Repository("datasets", "owner/photos", files, COMMIT))
    with made.serving():
        use_hub(monkeypatch, made.endpoint, tmp_path / "cache")
        yield made


def as_parquet(rows):
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


@pytest.mark.slow
def test_a_run_writes_down_the_commit_it_reads_and_goes_on_with_that(tmp_path, hub):
    out = f"out={tmp_path}/run"
    words = ["data=owner/photos", "stream.tasks=2", "trainer.accelerator=cpu", out]
    run = start_run(read_settings(words))
    run.folder.release()
    assert run.config.stream.revision == COMMIT
    assert read_yaml(tmp_path / "run" / "config.yaml")["stream"]["revision"] == COMMIT
    # Read at that commit every time: the newer one is not asked for.
    hub.repositories["datasets", "owner/photos"].commit = "f" * 40
    for settings in ([out], words):
        again = start_run(read_settings(settings))
        again.folder.release()
        assert again.config.stream.revision == COMMIT


@pytest.mark.slow
def test_the_commits_of_joined_data_sets_are_written_down_by_name(tmp_path, hub):
    (tmp_path / "far.yaml").write_text("source: owner/photos\n")
    (tmp_path / "both.yaml").write_text("sources: [digits, far.yaml]\nstream: {scenario: source}\n")
    words = [f"data={tmp_path}/both.yaml", f"out={tmp_path}/run", "trainer.accelerator=cpu"]
    start_run(read_settings(words)).folder.release()
    assert read_yaml(tmp_path / "run" / "config.yaml")["stream"]["revision"] == {"far": COMMIT}
    hub.repositories["datasets", "owner/photos"].commit = "f" * 40
    start_run(read_settings(words)).folder.release()


def test_a_name_for_a_commit_is_written_down_as_the_commit(hub):
    loaded = load_data(read_settings(["data=owner/photos", "stream.revision=main"]))
    assert loaded.revision == COMMIT


@pytest.mark.slow
def test_a_data_set_of_another_size_than_the_recipe_knows_is_named(folder, caplog):
    (folder / "photos.yaml").write_text(
        "source: photos\nfacts: {train: 7, test: 4, classes: 3}\nstream: {tasks: 2}\n"
    )
    words = [f"data={folder}/photos.yaml", f"out={folder}/run", "trainer.accelerator=cpu"]
    with caplog.at_level(logging.WARNING):
        start_run(read_settings(words)).folder.release()
    assert (
        "data set 'photos' has 6 training images instead of 7, 2 classes instead of 3: this is not"
        in caplog.text
    )
    caplog.clear()
    (folder / "photos.yaml").write_text(
        "source: photos\nfacts: {train: 6, test: 4, classes: 2}\nstream: {tasks: 2}\n"
    )
    with caplog.at_level(logging.WARNING):
        start_run(read_settings(words)).folder.release()
        # Other splits than those of the recipe are no surprise.
        words += ["stream.test_fraction=0.5", f"out={folder}/other"]
        start_run(read_settings(words)).folder.release()
    assert "instead of" not in caplog.text


def copy_of(name, folder):
    """A copy with the columns and names that the hub's has, and hardly any image."""
    config = read_settings([f"data={name}"])
    stream, facts = config.stream, find_data(name).facts
    if stream.label == "class_name":
        classes = find_data("imagenet-r").recipe["stream"]["order"]
        label = datasets.Value("string")
    else:
        classes = [f"{index + 1:03}.A_bird" for index in range(facts["classes"])]
        classes[26] = "cra" if name == "cifar100" else classes[26]
        label = datasets.ClassLabel(names=classes)
    features = {stream.image: datasets.Image(), stream.label: label}
    rows = {stream.image: [], stream.label: []}
    picture = Image.new("RGB", (4, 4))
    # Enough of each class for both parts where a split is divided.
    several = ["art"] * (8 if stream.test_fraction else 1)
    domains = stream.order if stream.scenario == "domain" else several
    for number, domain in enumerate(domains):
        for index, title in enumerate(classes):
            file = folder / f"{index}-{number}" / f"{domain}_{index}.png"
            file.parent.mkdir(parents=True)
            picture.save(file)
            rows[stream.image].append(str(file))
            rows[stream.label].append(title)
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    if stream.domain:
        names = datasets.ClassLabel(names=sorted(domains))
        column = [names.str2int(d) for d in domains for _ in classes]
        table = table.add_column(stream.domain, column, feature=names)
    (folder / name).mkdir()
    for split in {stream.train_split, "test"}:
        table.to_parquet(folder / name / f"{split}-00000.parquet")
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks", "names"),
    [
        ("cifar100", 10, {26: "crab", 0: "001.A_bird"}),
        ("cub200", 10, {0: "A bird"}),
        ("imagenet-r", 10, {0: "African chameleon", 199: "zebra"}),
        ("imagenet-r-domains", 15, {0: "African chameleon", 199: "zebra"}),
        ("domainnet", 6, {0: "001.A bird"}),
    ],
)
def test_the_recipes_of_the_paper_split_a_copy_as_the_hub_has_it(
    tmp_path, monkeypatch, name, tasks, names
):
    monkeypatch.setenv("CL_MERGE_DATA", str(tmp_path))
    config = copy_of(name, tmp_path)
    loaded = load_data(config)
    stream = TaskStream(loaded.splits, **asdict(config.stream))
    assert len(stream.tasks) == tasks
    assert len(stream.class_names) == find_data(name).facts["classes"]
    worded = read_class_names(config.class_names, stream.class_names)
    assert {index: worded[index] for index in names} == names
    if config.stream.scenario == "domain":
        assert [task.name for task in stream.tasks] == config.stream.order
    else:
        classes = [label for task in stream.tasks for label in task.classes]
        ordered = [stream.class_names[label] for label in classes]
        assert config.stream.order in (classes, ordered)


@pytest.mark.parametrize("name", ["mtil-offline", "mtil-offline-2"])
def test_the_offline_twin_of_mtil_is_joined_from_local_copies(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CL_MERGE_DATA", str(tmp_path))
    sources = find_data(name).sources
    for index, source in enumerate(sources):
        (tmp_path / source).mkdir()
        classes = [f"{source} {number}" for number in range(2 + index)]
        for split in ("train", "test"):
            photos(8 + index, classes).to_parquet(tmp_path / source / f"{split}.parquet")
    config = read_settings([f"data={name}"])
    loaded = load_data(config)
    stream = TaskStream(
        loaded.splits, scenario="source", order=config.stream.order, domain="source"
    )
    order = config.stream.order
    assert [task.name for task in stream.tasks] == list(sources if order == "natural" else order)
    assert [len(own.own_names) for own in loaded.prompts] == [2 + i for i in range(len(sources))]
    assert loaded.prompts[list(sources).index("trashnet")].prompts[0] == "a photo of {}."


def test_every_task_has_its_own_epochs_or_all_have_those_of_the_trainer():
    assert task_epochs(RunConfig(epochs=[3, 1]), 2) == [3, 1]
    assert task_epochs(RunConfig(trainer={"max_epochs": 4}), 3) == [4, 4, 4]
    assert task_epochs(RunConfig(trainer={}), 1) == [None]


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ([1, 2], "epochs has 2 numbers, but the stream has 3 tasks; expected one for each task"),
        ([1, 0, 1], "epochs=[1, 0, 1]; expected a list of whole numbers from 1, one per task"),
        ([1, 1.5, 1], "epochs=[1, 1.5, 1]; expected a list of whole numbers from 1"),
        ([1, True, 1], "epochs=[1, True, 1]; expected a list of whole numbers from 1"),
        (3, "epochs=3; expected a list of whole numbers from 1, one per task"),
    ],
)
def test_wrong_epochs_are_named(epochs, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        task_epochs(RunConfig(epochs=epochs), 3)


def test_prompts_of_open_clip_are_read_from_the_package():
    found = read_prompts("open_clip:OPENAI_IMAGENET_TEMPLATES")
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    assert len(found) == len(templates) == 80
    assert all(prompt.count("{}") == 1 for prompt in found)
    named = [prompt.format("newt") for prompt in found]
    assert named == [template("newt") for template in templates]


def test_prompts_are_a_list_or_one():
    assert read_prompts(["a {}.", "the {}."]) == ["a {}.", "the {}."]
    assert read_prompts("a {}.") == ["a {}."]


@pytest.mark.parametrize("value", [None, [], 3])
def test_prompts_that_are_none_are_named(value):
    with pytest.raises(InputError, match=f"^prompts={re.escape(str(value))}; expected a list"):
        read_prompts(value)


def test_a_list_that_open_clip_does_not_have_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'open_clip:OPENAI_IMAGENET_TEMPLATES'"):
        read_prompts("open_clip:OPENAI_IMAGENET_TEMPLATE")


def test_class_names_are_replaced_by_a_list_or_by_patterns_in_order():
    assert read_class_names(None, ["a", "b"]) == ["a", "b"]
    assert read_class_names(["x", "y"], ["a", "b"]) == ["x", "y"]
    patterns = {"^[0-9]+[.]": "", "_": " "}
    assert read_class_names(patterns, ["001.Sooty_Tern", "Tern"]) == ["Sooty Tern", "Tern"]
    assert read_class_names({"(a)(b)": r"\2\1"}, ["ab"]) == ["ba"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["x"], "class_names has 1 names, but the data set has 2 classes"),
        ("x", "class_names=x; expected a list of names, patterns with their replacements"),
        ({"(": ""}, "class_names: '(' is no regular expression"),
    ],
)
def test_wrong_class_names_are_named(value, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read_class_names(value, ["a", "b"])


def test_ids_of_wordnet_are_named_as_clip_names_them_or_by_their_first_synonym():
    known = {"n02123394": "Persian cat", "n01641577": "American bullfrog"}
    assert read_class_names("wordnet", list(known)) == list(known.values())
    # No class of ImageNet's thousand; and two that CLIP calls alike, sunglasses.
    assert read_class_names("wordnet", ["n00006024"]) == ["heterotroph"]
    assert read_class_names("wordnet", ["n04355933", "n04356056"]) == ["sunglass", "sunglasses"]
    with pytest.raises(InputError, match="^class_names=wordnet, but a class is called 'cat'; exp"):
        read_class_names("wordnet", ["cat"])
