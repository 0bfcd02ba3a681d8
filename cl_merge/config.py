"""The configuration of a run: every key, its default and what it means."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_merge.errors import InputError, listing, nearest, unknown_name
from cl_merge.files import is_no_file
from cl_merge.quantize import STORES
from cl_merge.scales import Scales
from cl_merge.trainer_options import check_trainer
from cl_merge.yaml_text import check_yaml

EVALUATE = ("every", "last")

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")

# The share of the training images that are held out if nothing is said and a scale is to be chosen.
HELD_OUT = 0.1

# Of Lightning's `seed_everything`, which seeds numpy too.
_LARGEST_SEED = 2**32 - 1

# A value that cannot be read is part of a message; this much of it will do.
_LONGEST = 300


def _key(default: object, about: str) -> Any:
    """A setting with its default and the line that ``--help`` shows for it."""
    if callable(default):
        return field(default_factory=default, metadata={"about": about})
    return field(default=default, metadata={"about": about})


@dataclass
class StreamConfig:
    """How the data set becomes tasks; handed to `TaskStream`."""

    tasks: int | None = _key(None, "number of tasks")
    scenario: str = _key(
        "class", "class (disjoint classes), domain or source (one each), or data (at random)"
    )
    order: Any = _key("natural", "order of classes, domains, sources: natural, a seed, a list")
    images_per_class: int | None = _key(None, "train on at most so many images of each class")
    held_out: float | None = _key(
        None, "share of the training images to choose merge.scale=auto on; null: 0.1 for that"
    )
    batch_size: int = _key(128, "images per batch and process")
    num_workers: int = _key(0, "processes that load images")
    cache: Any = _key("auto", "keep images in memory: true, false or auto")
    image: str = _key("image", "column of the images")
    label: str = _key("label", "column of the labels")
    domain: str | None = _key(None, "column of the domains")
    domain_pattern: str | None = _key(
        None, "of the file name of an image, with the domain as its group, where no column has it"
    )
    train_split: str = _key("train", "split to train on")
    test_split: str = _key("test", "split to test on")
    test_fraction: float | None = _key(None, "share of the training split to hold out for testing")
    split_seed: int | None = _key(None, "which share that is; null: drawn from seed")
    revision: Any = _key(
        None, "commit of a hub data set, or by name of joined ones; null: the newest"
    )


@dataclass
class OptimizerConfig:
    """How a task is trained; handed to `CLIPClassifier`."""

    lr: float = _key(1e-5, "peak learning rate")
    weight_decay: float = _key(0.1, "weight decay")
    schedule: str = _key("cosine", "cosine or constant, after the warm-up")
    warmup_steps: int = _key(500, "steps of linear warm-up in every task")
    label_smoothing: float = _key(0.0, "of the cross entropy")
    layer_decay: float = _key(1.0, "factor of lr from each layer to the one before it")


@dataclass
class MergeConfig:
    """How the method of the run merges, and in `beside` the methods beside it."""

    scale: Any = _key(
        None, "factor of the merged task vector, or one by pattern, or auto; null: the published"
    )
    groups: Any = _key(None, "of layers, a scale=auto for each: block, or a list of patterns")
    options: dict[str, Any] = _key(dict, "any options of the method")
    beside: dict[str, Any] = _key(dict, "by name, options and scale of methods beside it")
    density: float | None = _key(None, "share of the entries kept; null: as published")
    seed: int = _key(0, "of methods that draw, as random-mix")
    include: list[str] = _key(list, "patterns of the parameters to merge; none: all that train")
    exclude: list[str] = _key(list, "patterns of the parameters that keep their base values")
    store: str = _key("float32", "of task vectors: float32, bf16, int8, int4 or int2")
    device: str | None = _key(None, "where merging is done; null: where the training is")
    importance_samples: int | None = _key(
        None, "images of a task to weigh elements by, as fisher does; null: all"
    )
    buffers: str | None = _key(None, "batch-norm statistics when testing: trained, base or average")


@dataclass
class LwfConfig:
    """Options of the methods with learning without forgetting; handed to `LwF`."""

    weight: float = _key(0.3, "factor of the distillation loss")
    temperature: float = _key(2.0, "softens the outputs of teacher and student")
    first_task: bool = _key(False, "distil the pre-trained model in the first task")


@dataclass
class EwcConfig:
    """Options of the methods with elastic weight consolidation; handed to `EWC`."""

    fisher: str = _key("published", "published, empirical or sampled")
    weight: float | None = _key(None, "factor of the penalty; null: the one of the estimate")
    decay: float = _key(0.5, "share of the former Fisher in the running average")
    from_zero: bool = _key(True, "start the average at zero, which halves the first Fisher")
    first_task: bool = _key(False, "hold the pre-trained model in the first task")
    samples: int | None = _key(None, "images of a task to estimate from; null: all")


@dataclass
class RunConfig:
    """Everything that a run depends on."""

    data: str = _key("digits", "a name in the catalog, a YAML file, images on disk, or a hub id")
    source: str | None = _key(None, "folder, file or hub id instead of the catalog's for data=")
    model: str = _key("glyph", "glyph, lite, ARCHITECTURE:TAG, ARCHITECTURE:FILE, local-dir:FOLDER")
    image_size: int | None = _key(None, "height and width of the model's input, in pixels")
    prompts: Any = _key(
        lambda: ["a photo of a {}."],
        "prompts, with {} for the class name, or open_clip:NAME; null: those of joined data sets",
    )
    class_names: Any = _key(
        None, "names for the prompts: a list, or patterns to replace in the data set's names"
    )
    method: str = _key("magmax", "what merges the tasks, or classifies without merging")
    compare: Any = _key(True, "methods beside it: true (plain fine-tuning), all, false, or a list")
    evaluate: str = _key("every", "test after every task, or after the last one only: every, last")
    seed: int = _key(0, "of everything random")
    out: str | None = _key(None, "folder of the run, which goes on there; null: a new one in runs/")
    epochs: Any = _key(None, "epochs of each task, a list; null: trainer.max_epochs for all")
    checkpoint_seconds: float = _key(60.0, "least time between checkpoints, at ends of epochs")
    loggers: Any = _key(
        None, "csv, tensorboard, wandb, mlflow: one, a list, or options by name; null: first two"
    )
    stream: StreamConfig = _key(StreamConfig, "the tasks")
    optimizer: OptimizerConfig = _key(OptimizerConfig, "AdamW, started afresh for every task")
    merge: MergeConfig = _key(MergeConfig, "options of the method")
    lwf: LwfConfig = _key(LwfConfig, "learning without forgetting")
    ewc: EwcConfig = _key(EwcConfig, "elastic weight consolidation")
    trainer: dict[str, Any] = _key(
        lambda: {"max_epochs": 10, "gradient_clip_val": 1.0},
        "any argument of Lightning's Trainer",
    )


def described_keys(group: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """List every key with what it means.

    Args:
        group: The dataclass whose keys to list.
        prefix: What stands before each key.

    Returns:
        What each key means, by its full name.

    Example:
        >>> described_keys()["stream.tasks"]
        'number of tasks'
    """
    found = {}
    for item in fields(group):
        found[prefix + item.name] = str(item.metadata["about"])
        inner: Any = item.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            found |= described_keys(inner, f"{prefix}{item.name}.")
    return found


def default_of(key: str) -> Any:
    """The default of a setting.

    Args:
        key: Its full name.

    Returns:
        The default; None for a group of settings, and for one that has none.

    Example:
        >>> default_of("stream.batch_size")
        128
    """
    found: Any = RunConfig()
    for part in key.split("."):
        found = getattr(found, part)
    return None if is_dataclass(found) or found in ({}, []) else found


def read_config(
    arguments: Sequence[str],
    recipe: Mapping[str, Any],
    file: str | Path | None = None,
    *,
    origin: str = "the recipe of the data set",
) -> RunConfig:
    """Put a configuration together: defaults, then a recipe, then a file, then arguments.

    Args:
        arguments: ``key=value`` words, such as ``stream.tasks=10``.
        recipe: What is underneath, such as what the data set sets by itself.
        file: A YAML file.
        origin: Where the recipe comes from, for messages.

    Returns:
        The configuration, checked.

    Raises:
        InputError: If a key or a value is wrong; names the nearest valid key.

    Example:
        >>> read_config(["stream.tasks=10", "seed=3"], {}).stream.tasks
        10
    """
    layers = [(origin, OmegaConf.create(dict(recipe)))]
    if file is not None:
        layers.append((str(file), read_yaml(file)))
    layers.append(("the command line", parse_arguments(arguments)))
    config = OmegaConf.structured(RunConfig)
    for source, layer in layers:
        _check_keys(layer, source)
        config = _merged(config, layer, source)
    found: Any = OmegaConf.to_object(_resolved(config))
    _check_sizes(asdict(found))
    _check_values(found)
    if found.stream.held_out is None:
        found.stream.held_out = HELD_OUT if found.merge.scale == "auto" else 0.0
    return found  # type: ignore[no-any-return]


def logger_options(loggers: Any) -> dict[str, dict[str, Any]] | None:
    """Read what ``loggers`` says.

    Args:
        loggers: A name, a list of names, a mapping from names to options of Lightning's loggers;
            False for none.

    Returns:
        For each logger its options; None if nothing is said.

    Raises:
        InputError: If a name is unknown, or it is something else.

    Example:
        >>> logger_options(["csv", "wandb"])
        {'csv': {}, 'wandb': {}}
    """
    if loggers is None:
        return None
    if isinstance(loggers, Mapping):
        found = {str(name): options for name, options in loggers.items()}
    elif isinstance(loggers, (list, tuple)):
        found = {str(name): None for name in loggers}
    elif isinstance(loggers, str) or loggers is False:
        found = {loggers: None} if loggers else {}
    else:
        raise InputError(f"loggers={loggers}; expected a name, a list of names, or false")
    for name, options in found.items():
        if name not in LOGGERS:
            raise unknown_name("logger", name, LOGGERS)
        if options is not None and not isinstance(options, Mapping):
            raise InputError(f"loggers.{name}={options}; expected options of the logger, by name")
    return {name: dict(options or {}) for name, options in found.items()}


def parse_arguments(arguments: Sequence[str]) -> DictConfig:
    """Read ``key=value`` words.

    Args:
        arguments: The words.

    Returns:
        What they say, as a tree.

    Raises:
        InputError: If a word has no ``=`` or its value cannot be read.
    """
    for word in arguments:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip("-"):
            raise InputError(f"'{word}' is no setting; expected key=value, such as stream.tasks=5")
        if key.startswith("-"):
            raise InputError(f"'{word}': settings are written without dashes: {word.lstrip('-')}")
    found = OmegaConf.create()
    for word in arguments:
        try:
            found.merge_with_dotlist([_typed(word)])
        # OmegaConf passes on the errors of the YAML reader below it, which have no common base.
        except Exception as error:
            hint = "put quotes around text with brackets, braces or commas"
            raise InputError(f"cannot read '{word}' ({_first_line(error)}); {hint}") from error
    return found


def read_yaml(file: str | Path) -> DictConfig:
    """Read a YAML file of settings.

    Args:
        file: Where it lies.

    Returns:
        What it says.

    Raises:
        InputError: If it is missing or is no YAML mapping.
    """
    if is_no_file(file):
        raise InputError(f"config {file}: is no file; expected one of keys and values")
    try:
        text = Path(file).read_text(encoding="utf-8")
        check_yaml(text)
        found = OmegaConf.load(io.StringIO(text))
    except OSError as error:
        # OmegaConf raises one, too, for what is neither keys and values nor a list.
        reason = error.strerror or error
        raise InputError(f"config {file}: cannot be read ({reason})") from error
    # As above: the errors of the YAML reader.
    except Exception as error:
        raise InputError(f"config {file}: no valid YAML ({_first_line(error)})") from error
    if not isinstance(found, DictConfig):
        raise InputError(f"config {file}: expected keys and values, found a list")
    return found


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML.

    Args:
        config: The configuration.

    Returns:
        YAML that `read_yaml` reads back.
    """
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _typed(word: str) -> str:
    # YAML reads 1e-4 as text and 1.0e-4 as a number; people type the former.
    key, _, value = word.partition("=")
    if re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        value = repr(float(value))
    return f"{key}={value}"


def _check_keys(layer: DictConfig, origin: str) -> None:
    known = described_keys()
    # Not resolved: what a value refers to may be in another layer.
    tree: Any = OmegaConf.to_container(layer, resolve=False)
    for key, inner in tree.items():
        # What is within a setting that is itself a mapping is not known here: the arguments of
        # Lightning's Trainer, for one, are checked against the Trainer itself.
        group = any(name.startswith(f"{key}.") for name in known)
        nested = isinstance(inner, dict) and group
        for name in [f"{key}.{k}" for k in inner] if nested else [key]:
            if name not in known:
                raise InputError(f"{origin}: unknown key '{name}'{nearest(name, known)}")


def _merged(config: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, layer)  # type: ignore[return-value]
    except TypeError as error:
        raise InputError(
            f"{origin}: a list stands where keys and values are expected, or the other way round "
            f"({_misplaced(config, layer)})"
        ) from error
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise InputError(f"{origin}: {where}{_first_line(error)}") from error


def _resolved(config: DictConfig) -> DictConfig:
    """Put values in the place of references, and check them as if they had been written there."""
    try:
        # Without types first: a reference to a value of the wrong type is then named below.
        tree = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    # What is only known now: a value left out as ???, or a reference to a key that there is not.
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {_first_line(error)}") from error
    layer = OmegaConf.create(plain)  # type: ignore[arg-type]
    return _merged(OmegaConf.structured(RunConfig), layer, "what a setting refers to")


def _misplaced(config: DictConfig, layer: DictConfig) -> str:
    """Name the keys that cannot be merged for being a list or a mapping."""
    names = []
    for key, value in OmegaConf.to_container(layer, resolve=False).items():  # type: ignore[union-attr]
        try:
            OmegaConf.merge(config, OmegaConf.create({key: value}))
        except TypeError:
            names.append(str(key))
        except OmegaConfBaseException:  # wrong in another way
            continue
    return listing(names)


def _check_sizes(value: Any, name: str = "") -> None:
    """Make sure that whole numbers are such as torch can take and messages can show."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_sizes(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_sizes(inner, name)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{name}: a number of {value.bit_length()} bits; expected at most 63")


def _check_values(config: RunConfig) -> None:
    check_trainer(config.trainer)
    _check_merge(config.merge)
    logger_options(config.loggers)
    if config.evaluate not in EVALUATE:
        raise unknown_name("value of evaluate", config.evaluate, EVALUATE)
    if not config.checkpoint_seconds >= 0:
        raise InputError(f"checkpoint_seconds={config.checkpoint_seconds}; expected 0 or more")
    if config.seed < 0:
        raise InputError(f"seed={config.seed}; expected 0 or more")
    if config.seed > _LARGEST_SEED:
        raise InputError(f"seed={config.seed}; expected at most {_LARGEST_SEED}")


def _check_merge(merge: MergeConfig) -> None:
    if merge.scale != "auto":
        try:
            Scales.read(merge.scale, 1.0)
        except InputError as error:
            hint = "expected a finite number, finite numbers by pattern, or auto"
            raise InputError(f"merge.scale={merge.scale}; {hint}") from error
        if merge.groups:
            raise InputError(f"merge.groups={merge.groups}; only for merge.scale=auto")
    if merge.density is not None and not 0 < merge.density <= 1:
        raise InputError(f"merge.density={merge.density}; expected more than 0, at most 1")
    if merge.store not in STORES:
        raise unknown_name("value of merge.store", merge.store, STORES)


def _first_line(error: BaseException) -> str:
    # The reader of YAML says first what it was doing, then what is wrong and where.
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    text = f"{problem}, line {mark.line + 1}" if problem and mark else str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
