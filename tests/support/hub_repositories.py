"""The repositories that the recipes of the catalog name, laid out as on the hub, with few images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import datasets
import pytest
import yaml
from fake_hub import FakeHub, Repository
from PIL import Image
from timm.data import ImageNetInfo

from cl_merge.benchmarks.datasets.catalog import catalog, find_data, is_on_hub
from cl_merge.benchmarks.datasets.loading import settings_of

# As tanganke's sets have them, each as large as the test split.
CORRUPTED = (
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "spatter",
)


@dataclass(frozen=True)
class Layout:
    """How a repository is laid out; `rows` are what the card says of splits that no recipe uses."""

    folder: str = "data"
    configuration: str | None = None
    others: dict[str, int] = field(default_factory=dict)  # images of splits that are not used
    parts: int = 1  # files of the training split
    columns: tuple[str, ...] = ()  # more columns, of text
    domains: str = "names"  # or text
    other_configuration: str | None = None
    names: str = "thing {}"  # of classes, where the recipe does not list them
    legacy: bool = False  # as pushed before 2023: no card, names of files with a hash
    wordnet: bool = False  # whether classes are called by ids of WordNet
    renditions: str | None = None  # the recipe whose domains the names of files begin with


LAYOUTS = {
    "cifar100": Layout("cifar100", "cifar100", columns=("coarse_label",)),
    "cars": Layout(others=dict.fromkeys(CORRUPTED, 8041), parts=2),
    "mnist": Layout("mnist", "mnist"),
    "eurosat": Layout(others=dict.fromkeys(CORRUPTED, 2700)),
    "svhn": Layout(
        "cropped_digits",
        "cropped_digits",
        others={"extra": 531131},
        other_configuration="full_numbers",
    ),
    "resisc45": Layout(others=dict.fromkeys(CORRUPTED, 6300)),
    "sun397": Layout(parts=3),
    "dtd": Layout(),
    "gtsrb": Layout(others=dict.fromkeys(CORRUPTED, 12630)),
    "cub200": Layout(names="{0:03}.A_thing_{0}"),
    "domainnet": Layout(parts=3, columns=("image_path",), names="thing_{}"),
    "imagenet-r": Layout(
        "test", "test", parts=5, columns=("wnid",), renditions="imagenet-r-domains"
    ),
    "food101": Layout(names="a_dish_{}", parts=8),
    "pets": Layout(names="a_breed_{}"),
    "flowers102": Layout(),
    "aircraft": Layout(columns=("family", "manufacturer")),
    "caltech101-hub": Layout(names="a_thing_{}"),
    "dogs": Layout(),
    "tiny-imagenet-hub": Layout(wordnet=True, legacy=True),
    "imagenet-100": Layout(names="thing {0}, other {0}", parts=2),
    "imagenet-a": Layout(wordnet=True),
    "office-home": Layout(names="A_Thing_{}", domains="text"),
    "pacs-hub": Layout(domains="text"),
}


def class_names(name: str, order: object, scenario: str, number: int) -> list[str]:
    """Names as the hub has them: those of the recipe where it lists them."""
    if isinstance(order, list) and isinstance(order[0], str) and scenario == "class":
        return sorted(order)
    if LAYOUTS[name].wordnet:
        return ImageNetInfo("imagenet-1k").label_names()[:number]
    found = [LAYOUTS[name].names.format(index + 1) for index in range(number)]
    if name == "cifar100":
        found[26] = "cra"
    return found


def model_repository() -> Repository:
    """The repository of ``ViT-B-16-quickgelu:openai`` with a tiny model; see `tiny_model`."""
    import open_clip
    import torch
    from safetensors.torch import save

    torch.manual_seed(0)
    weights = save(open_clip.CLIP(**TINY).state_dict())
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    files = {"README.md": b"# A model\n", "open_clip_config.json": json.dumps(config).encode()}
    return Repository("models", MODEL, files | {"open_clip_model.safetensors": weights})


def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip know ``ViT-B-16-quickgelu`` as an architecture that is small enough to train."""
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-16-quickgelu", TINY)


MODEL = "timm/vit_base_patch16_clip_224.openai"

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def hub_of_recipes(names: Sequence[str] | None = None) -> FakeHub:
    """A hub with the repositories of recipes, all of the catalog that lie on the hub."""
    hub = FakeHub()
    for name in names or sorted(LAYOUTS):
        hub.add(repository(name))
    return hub


def hub_recipes() -> list[str]:
    """The recipes of the catalog that have a repository of their own."""
    found = [name for name in catalog() if is_on_hub(find_data(name).source or "/")]
    return [name for name in found if "extends" not in name and name != "imagenet-r-domains"]


@cache
def repository(name: str) -> Repository:
    """Make the repository of a recipe: columns, splits, files and card, at the commit it names."""
    entry, layout = find_data(name), LAYOUTS[name]
    stream = settings_of(entry).stream
    names = class_names(name, stream.order, stream.scenario, entry.facts["classes"])
    text = stream.label == "class_name"
    kinds: dict[str, Any] = {stream.image: datasets.Image()}
    kinds[stream.label] = datasets.Value("string") if text else datasets.ClassLabel(names=names)
    domains = ["art", "photo"] if stream.scenario == "domain" else ["art"]
    domains = list(stream.order) if isinstance(stream.order, list) and stream.domain else domains
    if layout.renditions:
        domains = list(settings_of(find_data(layout.renditions)).stream.order)
    if stream.domain:
        is_text = layout.domains == "text"
        one = datasets.ClassLabel(names=sorted(domains))
        kinds[stream.domain] = datasets.Value("string") if is_text else one
    kinds |= dict.fromkeys(layout.columns, datasets.Value("string"))
    features = datasets.Features(kinds)
    used = [part for split in (stream.train_split, stream.test_split) for part in split.split("+")]
    if stream.test_fraction:
        used = [stream.train_split]
    files: dict[str, bytes] = {}
    counts = {}
    for split in [*used, *layout.others]:
        first = len(counts)  # no two splits have the same images
        rows = list(_rows(stream, names, domains, layout.columns, first))
        rows = rows[:2] if split in layout.others else rows
        # Where a split is divided, enough for both parts.
        rows *= -(-60 // len(rows)) if stream.test_fraction else 1
        parts = layout.parts if split == stream.train_split else 1
        counts[split] = _told(entry.facts, split, stream, layout)
        for part in range(parts):
            ending = f"-1359597a978bc4f{part}" if layout.legacy else ""
            path = f"{layout.folder}/{split}-{part:05}-of-{parts:05}{ending}.parquet"
            files[path] = parquet(rows[part::parts], features)
    configurations = [(layout.configuration or "default", layout.folder, counts, features)]
    if layout.other_configuration:
        other = datasets.Features({"image": datasets.Image(), "digits": datasets.Value("string")})
        folder = layout.other_configuration
        files[f"{folder}/train-00000-of-00001.parquet"] = parquet([], other)
        configurations.insert(0, (folder, folder, {"train": 33402}, other))
    if layout.legacy:
        files["README.md"] = b"# A card\n"
        files["dataset_infos.json"] = legacy_infos(entry.source, counts, features)
    else:
        files["README.md"] = card(configurations)
    hub_id = str(entry.source).partition(":")[0]
    commit = f"{stream.revision or '':1<40}"  # of some the recipe has the first digits alone
    return Repository("datasets", hub_id, files, commit)


def card(
    configurations: Sequence[tuple[str, str, dict[str, int], datasets.Features]],
) -> bytes:
    """The card of a repository, as ``push_to_hub`` writes it."""
    configs, infos = [], []
    for name, folder, counts, features in configurations:
        files = [{"split": split, "path": f"{folder}/{split}-*"} for split in counts]
        configs.append({"config_name": name, "data_files": files})
        splits = [
            {"name": split, "num_bytes": 1000 * n, "num_examples": n} for split, n in counts.items()
        ]
        made = datasets.DatasetInfo(features=features)
        info = {"config_name": name, **made._to_yaml_dict(), "splits": splits}
        infos.append(info | {"download_size": 1000, "dataset_size": 1000})
    head = {"dataset_info": infos[0] if len(infos) == 1 else infos, "configs": configs}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# A card\n".encode()


def legacy_infos(source: str | None, counts: dict[str, int], features: datasets.Features) -> bytes:
    """What stood beside the files of a repository in place of its card."""
    splits = {
        split: {"name": split, "num_bytes": 1000 * n, "num_examples": n, "dataset_name": "x"}
        for split, n in counts.items()
    }
    name = str(source).replace("/", "--")
    return json.dumps({name: {"features": features.to_dict(), "splits": splits}}).encode()


def parquet(rows: Sequence[dict[str, Any]], features: datasets.Features) -> bytes:
    """Rows as the bytes of a parquet file, as ``push_to_hub`` writes it."""
    columns = {name: [row[name] for row in rows] for name in features}
    file = io.BytesIO()
    datasets.Dataset.from_dict(columns, features).to_parquet(file)
    return file.getvalue()


@cache
def picture(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 6), (37 * index % 256, 91 * index % 256, 11 * index % 256)).save(
        file, "PNG"
    )
    return file.getvalue()


def _rows(
    stream: Any,
    names: Sequence[str],
    domains: Sequence[str],
    more: Sequence[str],
    first: int,
) -> Iterator[dict[str, Any]]:
    label: Callable[[int], Any] = (
        (lambda index: names[index]) if stream.label == "class_name" else (lambda index: index)
    )
    for domain in domains:
        for index in range(len(names)):
            file = {"bytes": picture((index + first) % 16), "path": f"{domain}_{index}.png"}
            row = {stream.image: file, stream.label: label(index)}
            if stream.domain:
                row[stream.domain] = domain
            yield row | dict.fromkeys(more, "more")


def _told(facts: Any, split: str, stream: Any, layout: Layout) -> int:
    """How many images the card says that a split has."""
    if split in layout.others:
        return layout.others[split]
    train, test = facts.get("train", 100), facts.get("test", 100)
    if stream.test_fraction:
        return int(train + test)
    parts = stream.train_split.split("+")
    return int(train // len(parts) if split in parts else test)
