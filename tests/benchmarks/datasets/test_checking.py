"""``--check``: what runs need, compared with what there is, before anything is downloaded."""

import re
from dataclasses import replace

import datasets
import pytest
from fake_hub import FakeHub, Repository, use_hub
from hub_repositories import card, model_repository, parquet, picture, repository, tiny_model

from cl_merge import cli
from cl_merge.benchmarks.datasets.checking import DIFFERS, MISSING, OK, check_runs, data_needs
from cl_merge.benchmarks.runs.settings import read_settings


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = FakeHub()
    tiny_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with made.serving():
        use_hub(monkeypatch, made.endpoint, tmp_path / "cache")
        yield made


def of(findings, subject):
    return {f.what: (f.expected, f.found, f.state) for f in findings if f.subject == subject}


def check(words, tmp_path):
    return check_runs([read_settings(words)], tmp_path / "runs")


def parquet_sent(hub):
    return [file for file in hub.sent if file.endswith(".parquet")]


def test_a_recipe_that_fits_is_ok_and_only_one_image_is_read(hub, tmp_path):
    hub.add(repository("cars"))
    hub.add(model_repository())
    findings = check(["data=cars"], tmp_path)
    assert {finding.state for finding in findings} == {OK}
    found = of(findings, "cars")
    assert found["images of train"] == ("8144", "8144", OK)
    assert found["classes"] == ("196", "196: thing 1, thing 2 and 194 more", OK)
    assert found["one image"] == ("readable", "6 x 6 pixels", OK)
    assert re.match(r"on the hub; [\d.]+ kB to download, [\d.]+ MB of disk", found["source"][1])
    assert of(findings, "ViT-B-16-quickgelu:openai")["weights"][2] == OK
    assert not any("test" in file for file in parquet_sent(hub))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.slow
def test_domains_are_looked_at_in_a_column_or_in_the_name_of_a_file(hub, tmp_path):
    hub.add(repository("domainnet"))
    hub.add(repository("imagenet-r"))
    found = of(check(["data=domainnet"], tmp_path), "domainnet")
    assert (found["domains"][0], found["domains"][2]) == ("6", OK)
    found = of(check(["data=imagenet-r-domains"], tmp_path), "imagenet-r-domains")
    assert found["domain of one image"][1:] == ("tattoo", OK)
    found = of(check(["data=imagenet-r"], tmp_path), "imagenet-r")
    assert found["class of one image"] == ("one of 200 listed", "African_chameleon", OK)
    # A copy whose files have lost their names.
    lost = repository("imagenet-r")
    files = {p: b.replace(b"tattoo_", b"image__") for p, b in lost.files.items()}
    hub.add(replace(lost, files=files))
    found = of(check(["data=imagenet-r-domains"], tmp_path), "imagenet-r-domains")
    _, told, state = found["domain of one image"]
    assert "has the file name image__0.png, which says no domain" in told
    assert state == DIFFERS


@pytest.fixture
def other(hub):
    """A repository in the place of cifar100 that differs from the recipe in everything."""
    label = datasets.ClassLabel(names=["crab", "cra"])
    features = datasets.Features({"img": datasets.Value("string"), "fine_label": label})
    rows = [{"img": "no image", "fine_label": 0}]
    files = {"data/train-0.parquet": parquet(rows, features)}
    files["data/test-0.parquet"] = parquet(rows, features)
    files["README.md"] = card([("default", "data", {"train": 49999, "test": 10000}, features)])
    commit = read_settings(["data=cifar100"]).stream.revision
    hub.add(Repository("datasets", "uoft-cs/cifar100", files, commit))
    return hub


def test_what_differs_is_named(other, tmp_path):
    found = of(check(["data=cifar100"], tmp_path), "cifar100")
    assert found["images of train"] == ("50000", "49999", DIFFERS)
    assert found["images of test"][2] == OK
    assert found["column img"] == ("Image", "Value", DIFFERS)
    assert found["classes"] == ("100", "2: crab, cra", DIFFERS)
    assert found["class names"] == ("all different", "repeated: crab", DIFFERS)
    assert found["class order"][2] == DIFFERS
    assert found["one image"][0::2] == ("readable", DIFFERS)


@pytest.mark.parametrize(
    ("words", "what", "message"),
    [
        (["stream.label=name"], "columns", "img, fine_label"),
        (["stream.train_split=train+val"], "splits", "train, test"),
        (["stream.revision=" + "a" * 40], "source", "it has no commit aaaa"),
        (["source=owner/nothing"], "source", "the hub has nothing of this name"),
        (["source=/nowhere"], "source", "'/nowhere', to read images from: no such file or folder"),
    ],
)
def test_what_is_missing_is_named(other, tmp_path, words, what, message):
    found = of(check(["data=cifar100", *words], tmp_path), "cifar100")
    assert found[what][2] == MISSING
    assert message in found[what][1]


def test_what_a_card_does_not_say_is_read_from_the_ends_of_the_files(hub, tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = [{"image": {"bytes": picture(i), "path": "x.png"}, "label": i % 2} for i in range(5)]
    files = {f"data/{split}-0.parquet": parquet(rows, features) for split in ("train", "test")}
    hub.add(Repository("datasets", "owner/plain", files | {"README.md": b"# no data here\n"}))
    (tmp_path / "mine.yaml").write_text(
        "source: owner/plain\nstream: {tasks: 2}\nfacts: {train: 5, test: 6, classes: 2}\n"
    )
    found = of(check([f"data={tmp_path}/mine.yaml"], tmp_path), "mine")
    assert found["images of train"] == ("5", "5", OK)
    assert found["images of test"] == ("6", "5", DIFFERS)
    assert found["classes"][2] == OK


def test_joined_data_sets_are_checked_one_by_one(hub, tmp_path):
    hub.add(repository("mnist"))
    findings = check(["data=vision8"], tmp_path)
    assert of(findings, "mnist")["source"][2] == OK
    assert of(findings, "gtsrb")["source"][2] == MISSING


def test_the_disk_and_folders_of_this_machine_are_looked_at(hub, tmp_path, monkeypatch):
    hub.add(repository("mnist"))
    assert {state for *_, state in of(check(["data=mnist"], tmp_path), "here").values()} == {OK}
    monkeypatch.setattr("os.access", lambda path, mode: False)
    here = of(check(["data=mnist"], tmp_path), "here")
    assert here[f"folder {tmp_path}/runs"][1:] == ("it cannot be", MISSING)


def test_what_the_cache_has_needs_no_download(hub, tmp_path):
    hub.add(repository("mnist"))
    config = read_settings(["data=mnist"])
    assert data_needs([config])["mnist"].download > 0
    from cl_merge.benchmarks.datasets.loading import load_data

    load_data(config)
    assert data_needs([config]) == {}
    assert of(check(["data=mnist"], tmp_path), "mnist")["source"][1] == "in the cache"


@pytest.mark.slow
def test_the_commands_say_in_a_table_and_by_their_exit_code_whether_all_is_there(hub, capsys):
    hub.add(repository("cars"))
    table = ["bench", "table1", "--data", "cars", "--tasks", "5,10", "--methods", "magmax"]
    assert cli.main([*table, "--check"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"ViT-B-16-quickgelu:openai +weights .* missing", said)
    assert re.search(r"\d+ checks: \d+ ok, 1 missing; nothing was trained", said)
    hub.add(model_repository())
    assert cli.main([*table, "--check"]) == 0
    assert cli.main(["run", "data=cars", "--check"]) == 0
    capsys.readouterr()
    assert cli.main([*table, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\ncars: [\d.]+ kB to download, [\d.]+ MB of disk\n", said)
    assert re.search(r"\ntogether [\d.]+ MB at .*, where .* are free", said)


@pytest.mark.slow
def test_a_run_trains_on_what_it_has_downloaded_from_the_hub(hub, tmp_path, capsys):
    hub.add(repository("cifar100"))
    hub.add(model_repository())
    words = ["run", "data=cifar100", "stream.tasks=1", "trainer.max_epochs=1", "compare=false"]
    assert cli.main([*words, "trainer.accelerator=cpu", f"out={tmp_path}/run"]) == 0
    assert re.search(
        r"uoft-cs/cifar100, train and test: [\d.]+ kB to download", capsys.readouterr().out
    )
    assert (tmp_path / "run" / "merged.safetensors").exists()
