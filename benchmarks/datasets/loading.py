"""From the settings of a run to its images, the words for its classes, and epochs of its tasks."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn

from cl_merge.benchmarks.datasets.catalog import (
    DataEntry,
    find_data,
    find_source,
    is_on_hub,
    open_data,
)
from cl_merge.benchmarks.datasets.wordnet import wordnet_names
from cl_merge.config.reading import read_config, settings_named
from cl_merge.config.schema import RunConfig, StreamConfig
from cl_merge.data.concat import NamedSplits, concat
from cl_merge.data.hub_cache import cached_commit
from cl_merge.data.tables import parts_of, splits_read
from cl_merge.data.task_stream import TaskStream
from cl_merge.errors import InputError, nearest
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.pretrained import Clip, load_clip
from cl_merge.models.zero_shot import ZeroShotHead, zero_shot_head

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_PACKAGE = "open_clip:"  # begins the name of a list of prompts that open_clip comes with


@dataclass(frozen=True)
class ClassPrompts:
    """What the classes of one data set are called in which prompts, as the settings say."""

    prompts: Any
    class_names: Any
    own_names: list[str] | None = None  # the data set's; None for those of the stream


@dataclass(frozen=True)
class LoadedData:
    """The images of a run, and what goes with them."""

    splits: Mapping[str, datasets.Dataset]
    columns: Mapping[str, Any]  # settings of the stream that follow from how images were read
    prompts: list[ClassPrompts]  # of each data set, in the order of the labels
    revision: Any  # the commit that was read, or commits by name; None where there is none


def load_parts(config: RunConfig) -> tuple[TaskStream, CLIPClassifier]:
    """Load the images and the model that a configuration names, with the global generators seeded.

    Which commit of a hub data set was read is written into the configuration.
    """
    loaded = load_data(config)
    # What the hub hands out tomorrow may be something else.
    config.stream.revision = loaded.revision
    L.seed_everything(config.seed, workers=True, verbose=False)
    clip = load_clip(config.model, image_size=config.image_size)
    options = asdict(config.stream) | {
        "train_transform": clip.train_transform,
        "test_transform": clip.test_transform,
        "seed": config.seed,
    }
    with settings_named("stream"):
        stream = TaskStream(loaded.splits, **options | dict(loaded.columns))
    task_epochs(config, len(stream.tasks))  # checked before the head is made, which takes longer
    check_facts(config, stream)
    head = make_head(clip, loaded, stream)
    visual: nn.Module = clip.model.visual  # type: ignore[assignment]
    with settings_named("optimizer"):
        return stream, CLIPClassifier(visual, head, **asdict(config.optimizer))


def load_data(config: RunConfig) -> LoadedData:
    """Read the images that a configuration names, of one data set or of several joined ones."""
    entry = find_data(config.data)
    if entry.sources:
        return _load_joined(config, entry)
    if not (config.stream.revision is None or isinstance(config.stream.revision, str)):
        raise InputError(f"stream.revision={config.stream.revision}; expected a commit")
    stream = config.stream
    splits, revision = _read(config.source or find_source(entry), stream.revision, entry, stream)
    return LoadedData(splits, {}, [ClassPrompts(config.prompts, config.class_names)], revision)


def probe_configs(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration that each of a run's probes is read by."""
    words = [
        f"model={config.model}",
        f"image_size={'null' if config.image_size is None else config.image_size}",
        f"stream.batch_size={config.stream.batch_size}",
        f"stream.cache={str(config.stream.cache).lower()}",
    ]
    if config.stream.num_workers is not None:
        words.append(f"stream.num_workers={config.stream.num_workers}")
    found = {}
    for name in config.probe:
        if name == config.data:
            raise InputError(f"probe={name}: is the data of the stream; expected other data sets")
        try:
            entry = find_data(name)
            found[name] = read_config([f"data={name}", *words], entry.recipe)
        except InputError as error:
            raise InputError(f"probe={name}: {error}") from error
    return found


def make_head(clip: Clip, data: LoadedData, stream: TaskStream) -> ZeroShotHead:
    """Make the classifier, the classes of each data set with its own names and prompts."""
    heads = []
    for own in data.prompts:
        names = read_class_names(own.class_names, own.own_names or stream.class_names)
        heads.append(zero_shot_head(clip, names, read_prompts(own.prompts)))
    if len(heads) == 1 and data.prompts[0].own_names is None:
        return heads[0]
    # Data sets may share names, such as those of the digits; those of the stream differ.
    return ZeroShotHead(torch.cat([head.weight for head in heads]), stream.class_names)


def check_facts(config: RunConfig, stream: TaskStream) -> None:
    """Warn if what was read differs from what is known of the data set."""
    entry = find_data(config.data)
    recipe = settings_of(entry).stream
    found: dict[str, int] = {"classes": len(stream.class_names)}
    if all(getattr(config.stream, key) == getattr(recipe, key) for key in _SPLITTING):
        found |= stream.images_read
    differing = [
        f"{found[key]} {_WORDS[key]} instead of {known}"
        for key, known in entry.facts.items()
        if key in found and found[key] != known
    ]
    if differing:
        message = "data set '%s' has %s: this is not the data set of the recipe, or not all of it"
        log.warning(message, entry.name, ", ".join(differing))


def task_epochs(config: RunConfig, tasks: int) -> list[Any]:
    """How many epochs each task of a stream trains for: ``max_epochs`` of its trainer.

    Example:
        >>> task_epochs(RunConfig(epochs=[3, 1]), 2)
        [3, 1]
    """
    found = config.epochs
    if found is None:
        return [config.trainer.get("max_epochs")] * tasks
    listed = isinstance(found, Sequence) and not isinstance(found, str)
    if not listed or any(type(epochs) is not int or epochs < 1 for epochs in found):
        raise InputError(f"epochs={found}; expected a list of whole numbers from 1, one per task")
    if len(found) != tasks:
        raise InputError(
            f"epochs has {len(found)} numbers, but the stream has {tasks} tasks; expected one for "
            "each task, or epochs=null to train each for trainer.max_epochs"
        )
    return list(found)


def read_prompts(value: Any) -> list[str]:
    """Read the setting ``prompts``: a list, or the name of one that open_clip comes with.

    Example:
        >>> read_prompts("open_clip:SIMPLE_IMAGENET_TEMPLATES")[1]
        'a bad photo of the {}.'
    """
    if isinstance(value, str) and value.startswith(_PACKAGE):
        from open_clip import zero_shot_metadata

        lists = {f"{_PACKAGE}{name}": found for name, found in vars(zero_shot_metadata).items()}
        known = [name for name in lists if name.endswith("_TEMPLATES")]
        if value not in known:
            raise InputError(f"prompts={value}: open_clip has no such list{nearest(value, known)}")
        return [template("{}") for template in lists[value]]
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence) and value:
        return [str(prompt) for prompt in value]
    raise InputError(
        f"prompts={value}; expected a list of prompts with {{}} for the class name, or "
        f"{_PACKAGE}OPENAI_IMAGENET_TEMPLATES"
    )


def read_class_names(value: Any, names: Sequence[str]) -> list[str]:
    """Read the setting ``class_names``, over the data set's own names.

    It is None; a list with one name for each class; regular expressions with what replaces their
    matches, applied one after another; or ``wordnet``, where the names are WordNet ids.

    Example:
        >>> read_class_names({"^[0-9]+[.]": "", "_": " "}, ["001.Crested_Auklet"])
        ['Crested Auklet']
    """
    if value is None:
        return list(names)
    if value == "wordnet":
        return wordnet_names(names)
    if isinstance(value, Mapping):
        found = list(names)
        for pattern, replacement in value.items():
            if isinstance(replacement, (Mapping, list)) or replacement is None:
                raise InputError(
                    f"class_names: '{pattern}' is replaced by {replacement}; expected text, '' for "
                    "nothing"
                )
            try:
                found = [re.sub(str(pattern), str(replacement), name) for name in found]
            except re.error as error:
                raise InputError(
                    f"class_names: '{pattern}' is no regular expression, or '{replacement}' does "
                    f"not go with it ({error})"
                ) from error
        return found
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(
            f"class_names={value}; expected a list of names, patterns with their replacements, or "
            "wordnet"
        )
    if len(value) != len(names):
        raise InputError(
            f"class_names has {len(value)} names, but the data set has {len(names)} classes"
        )
    return [str(name) for name in value]


_SPLITTING = ("train_split", "test_split", "test_fraction")
_WORDS = {"train": "training images", "test": "test images", "classes": "classes"}


def _load_joined(config: RunConfig, entry: DataEntry) -> LoadedData:
    if config.source is not None:
        raise InputError(
            f"source={config.source}, but '{entry.name}' joins several data sets "
            f"({', '.join(entry.sources)}); set CL_MERGE_DATA to a folder that holds copies of "
            "them, each in a folder of its name"
        )
    revisions = config.stream.revision or {}
    if not isinstance(revisions, Mapping):
        raise InputError(
            f"stream.revision={revisions}, but '{entry.name}' joins several data sets; expected "
            "commits by name, as in stream.revision.NAME=COMMIT"
        )
    data, recipes, commits = [], [], {}
    for name in entry.sources:
        one = find_data(name)
        if one.sources:
            raise InputError(f"'{entry.name}' joins '{name}', which is itself joined")
        recipe = settings_of(one)
        pinned = revisions.get(one.name, recipe.stream.revision)
        splits, commit = _read(find_source(one), pinned, one, recipe.stream, joined=True)
        own = {key: getattr(recipe.stream, key) for key in _READ}
        data.append(NamedSplits(one.name, splits, split_seed=recipe.stream.split_seed or 0, **own))
        recipes.append(recipe)
        if commit is not None:
            commits[one.name] = commit
    with settings_named("stream"):
        joined, names = concat(data)
    columns = {key: getattr(StreamConfig, key) for key in (*_READ, "domain_pattern")}
    columns["domain"] = "source"
    return LoadedData(joined, columns, joined_prompts(config, recipes, names), commits or None)


# What says how a data set is read; of joined ones each has its own.
_READ = ("image", "label", "train_split", "test_split", "test_fraction")


def joined_prompts(
    config: RunConfig, recipes: list[RunConfig], names: list[list[str]]
) -> list[ClassPrompts]:
    """The prompts of each of the joined data sets: those given for all, or its own."""
    found, every = [], [name for own_names in names for name in own_names]
    given = iter(read_class_names(config.class_names, every))
    for recipe, own_names in zip(recipes, names, strict=True):
        prompts = recipe.prompts if config.prompts is None else config.prompts
        chosen = recipe.class_names
        if config.class_names is not None:
            chosen = list(islice(given, len(own_names)))
        found.append(ClassPrompts(prompts, chosen, own_names))
    return found


def settings_of(entry: DataEntry) -> RunConfig:
    """Read the recipe of a data set."""
    return read_config([], entry.recipe, origin=str(entry.file or f"the recipe of {entry.name}"))


def _read(
    source: str,
    revision: str | None,
    entry: DataEntry,
    stream: StreamConfig,
    *,
    joined: bool = False,
) -> tuple[Mapping[str, datasets.Dataset], str | None]:
    """Read the splits of one data set that a stream needs, and find out which commit that is."""
    if not is_on_hub(source):
        return open_data(source), revision
    needed = splits_read(stream.train_split, stream.test_split, stream.test_fraction)
    options: dict[str, Any] = {"revision": revision, "splits": parts_of(needed)}
    if source != entry.name:
        alone = "" if joined else f"give source=/path/to/{entry.name} or "
        options["local_copy"] = (
            f"{alone}set CL_MERGE_DATA to the folder that holds {entry.name}/, for data set "
            f"'{entry.name}'"
        )
    splits = open_data(source, **options)
    commit = cached_commit(splits) or revision
    if commit is None:
        log.warning(
            "the hub does not say which commit of %s this is, so that another run may read "
            "another one; give stream.revision",
            source,
        )
    return splits, commit
