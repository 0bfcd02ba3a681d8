"""The catalog of data sets and the methods of a run."""

import json
import re

import pytest

from cl_merge.benchmarks.datasets.catalog import (
    catalog,
    find_data,
    find_source,
    is_on_hub,
    open_data,
)
from cl_merge.benchmarks.datasets.loading import read_prompts
from cl_merge.benchmarks.methods.method import (
    METHODS,
    Method,
    compared_methods,
    find_method,
    published_scale,
)
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.errors import InputError
from cl_merge.models.pretrained import resolve

PAPER = ["cifar100", "imagenet-r", "imagenet-r-domains", "cub200", "cars", "domainnet", "vision8"]


@pytest.fixture(scope="module")
def paper(shared):
    folder = shared / "paper"
    if not folder.is_dir():
        pytest.skip(f"no published recipe at {folder}")
    return {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("recipe", "orders")
    }


@pytest.mark.parametrize("name", catalog())
def test_every_recipe_is_a_valid_configuration(name):
    config, entry = read_settings([f"data={name}"]), find_data(name)
    assert config.data == entry.name == name
    assert entry.about
    if entry.sources:
        # Each of the joined ones has its own.
        assert config.prompts is None
    else:
        assert all(prompt.count("{}") == 1 for prompt in read_prompts(config.prompts))


@pytest.mark.parametrize("name", [name for name in catalog() if find_data(name).facts])
def test_what_is_known_of_a_data_set_fits_its_recipe(name):
    config, entry = read_settings([f"data={name}"]), find_data(name)
    facts = entry.facts
    for images in ("train", "test"):
        assert facts.get(images, facts["classes"]) >= facts["classes"] > 1
    order, scenario = config.stream.order, config.stream.scenario
    if isinstance(order, list):
        expected = facts[{"domain": "domains", "source": "tasks"}.get(scenario, "classes")]
        assert len(order) == len(set(order)) == expected
        assert all(isinstance(item, str) for item in order) or set(order) == set(range(len(order)))
    if scenario == "class":
        assert 1 < config.stream.tasks <= facts["classes"]


@pytest.mark.parametrize("name", [n for n in catalog() if is_on_hub(find_data(n).source or "/")])
def test_a_data_set_of_the_hub_is_pinned_to_a_commit(name):
    # Of these no commit was ever seen.
    found = find_data(name).recipe["stream"].get("revision")
    assert (found is None) == (name in ("food101", "tiny-imagenet-hub"))
    assert found is None or re.fullmatch("[0-9a-f]{7,40}", found)


@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_are_those_of_the_paper(name, paper):
    recipe = paper["recipe"]
    config = read_settings([f"data={name}"])
    assert resolve(config.model)[:2] == ("ViT-B-16-quickgelu", "openai")
    given, optimizer = recipe["optimizer"], config.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (given["lr"], given["weight_decay"])
    assert (optimizer.schedule, optimizer.label_smoothing) == ("cosine", given["label_smoothing"])
    assert optimizer.warmup_steps == recipe["schedule"]["warmup_steps"]
    assert config.stream.batch_size == given["batch_size"]
    assert config.trainer["gradient_clip_val"] == given["clip_grad_norm"]
    if name != "vision8":
        epochs = recipe["epochs_per_task"][name.removesuffix("-domains")]
        assert config.trainer["max_epochs"] == epochs
        assert config.epochs is None
    if name in recipe["tasks"]:
        assert config.stream.tasks == 10
        assert 10 in recipe["tasks"][name]


@pytest.mark.parametrize("name", ["cifar100", "cars"])
def test_the_prompts_are_those_of_the_paper(name, paper):
    assert read_settings([f"data={name}"]).prompts == paper["recipe"]["prompts"][name]


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-r-domains", "cub200", "domainnet"])
@pytest.mark.slow
def test_the_other_prompts_are_those_of_open_clip(name, paper):
    text = next(v for k, v in paper["recipe"]["prompts"].items() if "imagenet-r" in k)
    prompts = read_settings([f"data={name}"]).prompts
    assert prompts.removeprefix("open_clip:") in text


@pytest.mark.parametrize("name", ["cifar100", "cub200"])
def test_the_class_orders_are_those_of_the_paper(name, paper):
    order = read_settings([f"data={name}"]).stream.order
    assert order == paper["orders"]["class_orders"][name]


def test_the_order_of_imagenet_r_by_name_is_that_of_the_paper_by_alphabet(paper):
    order = read_settings(["data=imagenet-r"]).stream.order
    # Labels that are strings become classes in this order, capitals first.
    alphabet = sorted(order)
    assert alphabet[:3] == ["African_chameleon", "Granny_Smith", "accordion"]
    indices = [alphabet.index(name) for name in order]
    assert indices == paper["orders"]["class_orders"]["imagenet-r"]


def test_cars_come_in_their_natural_order(paper):
    assert "cars" not in paper["orders"]["class_orders"]
    assert read_settings(["data=cars"]).stream.order == "natural"


@pytest.mark.parametrize("name", ["imagenet-r", "domainnet"])
def test_the_domain_orders_are_those_of_the_paper(name, paper):
    found = paper["orders"]["domain_orders"][name]
    data = "imagenet-r-domains" if name == "imagenet-r" else name
    config = read_settings([f"data={data}"])
    assert config.stream.scenario == "domain"
    assert config.stream.order == [found["domains"][i] for i in found["order"]]


def test_imagenet_r_is_divided_the_same_way_whatever_the_seed():
    stream = read_settings(["data=imagenet-r", "seed=7"]).stream
    assert (stream.test_fraction, stream.split_seed) == (0.2, 0)


def test_the_eight_data_sets_and_their_epochs_are_the_published_ones(paper):
    config, entry = read_settings(["data=vision8"]), find_data("vision8")
    pairs = paper["recipe"]["eight_datasets"]["order_and_epochs"]
    assert list(entry.sources) == [name.lower() for name, _ in pairs]
    assert config.epochs == [epochs for _, epochs in pairs]
    assert config.stream.scenario == "source"
    members = [find_data(name) for name in entry.sources]
    for fact in ("train", "test", "classes"):
        assert entry.facts[fact] == sum(member.facts[fact] for member in members)


def test_every_data_set_that_extends_another_differs_in_what_it_says_alone():
    below, above = (dict(find_data(n).recipe) for n in ("imagenet-r", "imagenet-r-domains"))
    assert below.pop("stream") != above.pop("stream")
    assert below == above
    assert find_data("imagenet-r-domains").source == find_data("imagenet-r").source
    assert find_data("imagenet-r-domains").facts["train"] == 24000


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


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_of_the_users_works_like_a_name_of_the_catalog(tmp_path, monkeypatch):
    (tmp_path / "here" / "photos").mkdir(parents=True)
    write(
        tmp_path / "here",
        mine="source: photos\nstream: {tasks: 3}\nfacts: {train: 7}\n",
        more="extends: mine.yaml\nseed: 4\n",
        other="extends: cifar100\nsource: owner/name\n",
    )
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "more"):
        entry = find_data(f"here/{name}.yaml")
        assert entry.name == name
        assert find_source(entry) == str(tmp_path / "here" / "photos")
        assert entry.facts == {"train": 7}
        config = read_settings([f"data=here/{name}.yaml"])
        # From the root, so that the run goes on wherever it is called from.
        assert config.data == str(tmp_path / "here" / f"{name}.yaml")
        assert config.stream.tasks == 3
    assert config.seed == 4
    other = find_data("here/other.yaml")
    assert (other.source, other.recipe["stream"]["label"]) == ("owner/name", "fine_label")


def test_joined_data_sets_are_found_from_the_file_that_names_them(tmp_path):
    write(tmp_path, a="source: x/y\n", both="sources: [digits, a.yaml]\n")
    entry = find_data(str(tmp_path / "both.yaml"))
    assert entry.sources == ("digits", str(tmp_path / "a.yaml"))
    assert find_data(entry.sources[1]).source == "x/y"
    assert read_settings([f"data={tmp_path}/both.yaml"]).prompts is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sorce: x", "unknown key 'sorce'; did you mean 'source'?"),
        ("extend: digits", "unknown key 'extend'; did you mean 'extends'?"),
        ("stream: {task: 3}", "unknown key 'stream.task'; did you mean 'stream.tasks'?"),
        ("extends: digit", "unknown data set in extends of"),
        ("extends: mine.yaml", "extends itself"),
        ("source: x\nsources: [digits]", "has both source and sources; expected one of them"),
        ("source: [x]", "source is ['x']; expected a path or a hub id"),
        ("facts: {trains: 3}", "unknown key 'facts.trains'; did you mean 'train'?"),
        ("facts: {train: many}", "facts.train is many; expected a whole number"),
        ("facts: 3", "facts is 3; expected numbers by name: train, test, classes"),
        ("- a", "expected keys and values, found a list"),
    ],
)
def test_a_wrong_file_of_the_users_is_named(tmp_path, text, message):
    write(tmp_path, mine=text)
    with pytest.raises(InputError, match=r"mine\.yaml") as caught:
        read_settings([f"data={tmp_path}/mine.yaml"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_says_no_source_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("CL_MERGE_DATA", raising=False)
    with pytest.raises(InputError, match=r"^config .*none\.yaml: cannot be read"):
        find_data(str(tmp_path / "none.yaml"))
    write(tmp_path, bare="seed: 1\n")
    with pytest.raises(InputError, match=r"write 'source: FOLDER' or a hub id into .*bare\.yaml"):
        find_source(find_data(str(tmp_path / "bare.yaml")))


def test_a_local_copy_stands_in_for_the_source_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_MERGE_DATA", str(tmp_path))
    assert find_source(find_data("cifar100")) == "uoft-cs/cifar100"
    (tmp_path / "cifar100").mkdir()
    assert find_source(find_data("cifar100")) == str(tmp_path / "cifar100")


def test_an_unknown_data_set_of_the_package_is_named():
    with pytest.raises(InputError, match="unknown data set of the package 'digit'; did you mean"):
        open_data("builtin:digit")


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


def test_the_methods_of_the_table_are_those_of_the_paper_their_twins_and_class_statistics():
    assert list(METHODS) == [
        "zero-shot",
        "joint",
        "sequential",
        "independent",
        "lwf",
        "ewc",
        "drift-penalty",
        "magmax",
        "magmax-drift",
        "lwf-magmax",
        "ewc-magmax",
        "drift-penalty-magmax",
        "max-abs",
        "average",
        "task-arithmetic",
        "random-mix",
        "ties",
        "average-sequential",
        "task-arithmetic-sequential",
        "random-mix-sequential",
        "ties-sequential",
        "streaming-lda",
        "magmax-aligned",
        "magmax-statistics",
    ]
    assert published_scale(find_method("magmax")) == 0.5
    assert published_scale(find_method("ties-sequential")) == 0.55
    assert published_scale(find_method("sequential")) is None


def test_what_is_shown_beside_a_method():
    def names(method, compare):
        return [found.name for found in compared_methods(method, compare)]

    plain = [
        name for name in METHODS if METHODS[name].training in ("sequential", "independent", None)
    ]
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
    assert compared_methods("magmax", "ties,ema") == compared_methods("magmax", ["ties", "ema"])
    shown = compared_methods(place, ["ties", f"{place}-sequential"])
    assert [m.name for m in shown] == ["zero-shot", "ties", "own-median", "own-median-sequential"]
    assert [m.name for m in compared_methods(place, "all")] == [*METHODS, "own-median"]


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
