"""The configuration of a run: every key, its default and what it means."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any

EVALUATE = ("every", "last")

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")

# The share of the training images that are held out if nothing is said and a scale is to be chosen.
HELD_OUT = 0.1


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
    num_workers: int | None = _key(
        None, "processes that load images; null: on a GPU its share of the cores, up to 16, else 0"
    )
    unreadable: str = _key(
        "stop", "images that cannot be read: stop at the first, or skip, after a look at all"
    )
    cache: Any = _key("auto", "keep decoded images: true, false or auto, where there is room")
    image: str = _key("image", "column of the images")
    label: str = _key("label", "column of the labels")
    domain: str | None = _key(None, "column of the domains")
    domain_pattern: str | None = _key(
        None, "of the file name of an image, with the domain as its group, where no column has it"
    )
    train_split: str = _key("train", "split to train on, or several: train+validation")
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
        None,
        "factor of the merged task vector, or one by pattern, auto or drift; null: the method's",
    )
    groups: Any = _key(None, "of layers, a scale=auto for each: block, or a list of patterns")
    options: dict[str, Any] = _key(dict, "any options of the method")
    beside: dict[str, Any] = _key(dict, "by name, options and scale of methods beside it")
    density: float | None = _key(None, "share of the entries kept; null: as published")
    seed: int = _key(0, "of methods that draw, as random-mix")
    include: list[str] = _key(list, "patterns of the parameters to merge; none: all that train")
    exclude: list[str] = _key(
        list, "patterns of the parameters that are not merged: as the last task left them"
    )
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
class DriftPenaltyConfig:
    """Options of the methods with a penalty on the drift of features; handed to `DriftPenalty`."""

    weight: float = _key(50.0, "factor of the squared change of features")
    samples: int | None = _key(200, "images of a task to estimate from; null: all")


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
        None,
        "names for the prompts: a list, patterns to replace in the data set's names, or wordnet, "
        "where those are ids of it",
    )
    method: str = _key("magmax", "what merges the tasks, or classifies without merging")
    compare: Any = _key(True, "methods beside it: true (plain fine-tuning), all, false, or a list")
    probe: list[str] = _key(
        list, "data sets beside the stream to test on, too, each with its own classes and prompts"
    )
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
    drift_penalty: DriftPenaltyConfig = _key(DriftPenaltyConfig, "penalty on drift of features")
    trainer: dict[str, Any] = _key(
        # By itself Lightning would take every GPU, each with a batch of its own.
        lambda: {"max_epochs": 10, "gradient_clip_val": 1.0, "devices": 1},
        "any argument of Lightning's Trainer",
    )


def described_keys(group: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """What each key means, by its full name.

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
    """The default of a setting; None for a group of settings, and for one that has none.

    Example:
        >>> default_of("stream.batch_size")
        128
    """
    found = attrgetter(key)(RunConfig())
    return None if is_dataclass(found) or found in ({}, []) else found
