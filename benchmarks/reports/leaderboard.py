"""Results of any number of runs and suites, also from other machines, joined into one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import msgspec
from msgspec import Struct

from cl_merge.benchmarks.datasets.catalog import catalog, find_data, is_data_file
from cl_merge.benchmarks.formatting import counted, data_label
from cl_merge.benchmarks.methods.method import TRAININGS
from cl_merge.benchmarks.reports.summary import METRICS, PAPER, WITHOUT_TASKS
from cl_merge.benchmarks.runs.provenance import settings_of
from cl_merge.benchmarks.runs.results import Percent, read_results
from cl_merge.config.reading import parse_arguments, read_yaml
from cl_merge.config.schema import RunConfig, default_of
from cl_merge.errors import InputError, listing
from cl_merge.mergers import MERGERS

# Settings that say who ran it and how often, not what: all else makes another stream.
_AXES = {
    "seed",
    "stream.order",
    "method",
    "compare",
    "source",
    "evaluate",
    "probe",
    "checkpoint_seconds",
}
_AXES |= {"stream.num_workers", "stream.cache", "trainer.accelerator", "trainer.strategy"}
_AXES |= {"data", "model", "stream.tasks"}  # what the name of a stream says
# Settings of methods: of all that merge, of those that merge as the run's own, of a training.
_OF_ALL = ("merge.store", "merge.include", "merge.exclude", "merge.buffers")
_OF_OWN = ("merge.density", "merge.seed", "merge.options.")
_SCALE = ("merge.scale", "merge.groups")
_BESIDE = "merge.beside"
_TRAININGS = {t.name: f"{t.regularizer}." for t in TRAININGS.values() if t.regularizer}
_SOURCE = "Marczak et al., MagMax, ECCV 2024, tables 1 and 2"
_MODEL = "ViT-B-16-quickgelu:openai"
_STATISTICS = ("-statistics", "-aligned")
_DRIFT = "-drift"


@dataclass(frozen=True)
class Stream:
    """What methods are compared on: data, tasks, model and how a task is trained."""

    data: str
    tasks: int
    model: str
    settings: tuple[str, ...]  # ``key=value`` words that the name does not say

    @property
    def name(self) -> str:
        """Data set and number of tasks."""
        return f"{self.data}, {counted(self.tasks, 'task')}"


@dataclass(frozen=True)
class Row:
    """A method with its options."""

    method: str
    training: str
    options: tuple[str, ...] = ()  # ``key=value`` words

    @property
    def name(self) -> str:
        """The method, with its options in brackets."""
        return f"{self.method} ({', '.join(self.options)})" if self.options else self.method


@dataclass(frozen=True)
class Finding:
    """What one run found for one method."""

    file: str  # its ``results.json``
    command: str
    commit: str
    versions: Mapping[str, str]
    machine: str
    seed: int
    order: str  # of the classes, as it was asked for
    metrics: Mapping[str, float]


class Published(Struct, frozen=True, forbid_unknown_fields=True):
    """A figure that others report, which was not measured here."""

    method: str
    accuracy: Percent
    source: str
    data: str
    tasks: int | None = None  # None for any number
    model: str | None = None  # None for any

    def is_of(self, stream: Stream) -> bool:
        """Whether it stands in the column of a stream."""
        own = ((self.data, stream.data), (self.tasks, stream.tasks), (self.model, stream.model))
        return all(said in (None, has) for said, has in own)


class _PublishedFile(Struct, forbid_unknown_fields=True):
    published: list[Published]


@dataclass
class Leaderboard:
    """Findings by stream and row; several are of other seeds, orders or machines."""

    cells: dict[tuple[Stream, Row], list[Finding]] = field(default_factory=dict)
    published: list[Published] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # files of results without their command

    @property
    def streams(self) -> list[Stream]:
        """Its columns, by name."""
        found = dict.fromkeys(stream for stream, _ in self.cells)
        return sorted(found, key=lambda s: (s.data, s.tasks, s.model, s.settings))

    @property
    def rows(self) -> list[Row]:
        """Its rows, by name."""
        return sorted(dict.fromkeys(row for _, row in self.cells), key=lambda row: row.name)


def read_leaderboard(folders: Sequence[Path], published: Path | None = None) -> Leaderboard:
    """Join what runs have found, wherever their ``results.json`` lie below some folders.

    Args:
        folders: Of runs, of suites, or of any of these.
        published: A YAML file of figures of others, a list under ``published``, each with
            ``method``, ``accuracy`` in per cent, ``source``, ``data``, and if they are of one only,
            ``tasks`` and ``model``.

    Returns:
        The findings. A result that does not say by which command it was found is not among them,
        but its file among the refused.

    Raises:
        InputError: If a folder is none or has no results below it, a file is damaged, or no result
            says its command.
    """
    board = Leaderboard()
    found: dict[Path, Path] = {}  # each once, also where the folders overlap
    for folder in folders:
        files = sorted(folder.rglob("results.json"))
        if not files:
            raise InputError(f"'{folder}' has no results.json in it or below it")
        found |= {file.resolve(): file for file in files}
    for file in found.values():
        _add(board, file, read_results(file.parent) or {})
    if not board.cells:
        raise InputError(
            f"no results say the command that found them: {listing(board.refused)}; they were "
            "written by an earlier version, run them again"
        )
    _spread_joint(board)
    board.published = _published(published)
    return board


def spread_of(findings: Iterable[Finding], metric: str) -> tuple[float, float | None, int] | None:
    """Mean, sample standard deviation (None of one value), and number of values of a metric."""
    values = [f.metrics[metric] for f in findings if metric in f.metrics]
    if not values:
        return None
    return mean(values), stdev(values) if len(values) > 1 else None, len(values)


def _add(board: Leaderboard, file: Path, results: Mapping[str, Any]) -> None:
    if not results.get("command"):
        board.refused.append(str(file))
        return
    settings = settings_of(results["command"])
    stream = Stream(
        data_label(results["data"]), len(results["tasks"]), results["model"], _of_stream(settings)
    )
    total, machine = results["total"], results.get("machine", {})
    cost = {
        "seconds": total["seconds"],
        "peak_memory": max(total["peak_memory"], total["peak_device_memory"]),
    }
    for name, found in results["methods"].items():
        metrics = {
            key: x for key, x in found["metrics"].items() if x is not None and key in METRICS
        }
        finding = Finding(
            file=str(file),
            command=results["command"],
            commit=results.get("commit") or "",
            versions=results.get("versions", {}),
            machine=", ".join(
                str(machine[k]) for k in ("device", "processor", "platform") if k in machine
            ),
            seed=results["seed"],
            order=settings.get("stream.order", "of the recipe"),
            metrics={"accuracy": found["accuracy"], **metrics, **cost},
        )
        row = Row(
            name, found["training"] or "none", _of_method(settings, name, found, results["method"])
        )
        cell = board.cells.setdefault((stream, row), [])
        if not any(_says_the_same(finding, other, name) for other in cell):
            cell.append(finding)


def _says_the_same(one: Finding, other: Finding, method: str) -> bool:
    """Whether it is the same value: a method may be in several runs, zero-shot is in each."""

    def axes(finding: Finding) -> tuple[object, ...]:
        return finding.seed, finding.order, finding.machine

    same = method == "zero-shot" or axes(one) == axes(other)
    return same and one.metrics["accuracy"] == other.metrics["accuracy"]


def _of_stream(settings: Mapping[str, str]) -> tuple[str, ...]:
    data = settings.get("data", RunConfig.data)
    words = {k: v for k, v in settings.items() if k not in _AXES}
    # The name of a column is not the whole path.
    words |= {} if data in catalog() else {"data": data}
    # Several devices share a step; what counts is how many images it has.
    own, devices = _own_batch(data), words.get("trainer.devices", "1")
    numbers = (
        words.get("stream.batch_size", own),
        str(devices.count(",") + 1) if devices.startswith("[") else devices,
        words.get("trainer.num_nodes", "1"),
    )
    if all(map(str.isdecimal, numbers)):
        for key in ("stream.batch_size", "trainer.devices", "trainer.num_nodes"):
            words.pop(key, None)
        step = str(prod(map(int, numbers)))
        words |= {} if step == own else {"stream.batch_size": step}
    of_others = ("merge.", "loggers", *_TRAININGS.values())
    return tuple(sorted(f"{k}={v}" for k, v in words.items() if not k.startswith(of_others)))


def _own_batch(data: str) -> str:
    """The images of a step by the recipe of a data set; empty if that is the file of a user."""
    if is_data_file(data):
        return ""  # which may be on another machine
    recipe = find_data(data).recipe if data in catalog() else {}
    return str(recipe.get("stream", {}).get("batch_size", default_of("stream.batch_size")))


def _of_method(
    settings: Mapping[str, str], method: str, found: Mapping[str, Any], own: str
) -> tuple[str, ...]:
    """The options of a method as words."""
    starts = [_TRAININGS[found["training"]]] if found["training"] in _TRAININGS else []
    options: Mapping[str, Any] = {}
    if found["merger"]:
        starts += _OF_ALL
        if getattr(MERGERS.get(found["merger"]), "weighted", False):
            starts.append("merge.importance_samples")
        options = _merge_options(settings, _plain(method), _plain(own))
    words = {k: v for k, v in settings.items() if k.startswith(tuple(starts))}
    return tuple(
        sorted(f"{k.removeprefix('merge.')}={v}" for k, v in (*words.items(), *options.items()))
    )


def _merge_options(settings: Mapping[str, str], method: str, own: str) -> Mapping[str, Any]:
    """With what a method merges, as `make_merger` chooses it."""
    words = [f"{key}={value}" for key, value in settings.items() if key.startswith(_BESIDE)]
    beside = parse_arguments(words).get("merge", {}).get("beside") or {}
    merging = method.removesuffix(_DRIFT)
    if method in beside:
        return beside[method] or {}
    if merging != own.removesuffix(_DRIFT):
        return {k: v for k, v in (beside.get(merging) or {}).items() if k != "scale"}
    keys = (*_OF_OWN, *_SCALE) if method == own else _OF_OWN
    return {k.removeprefix("merge.options."): v for k, v in settings.items() if k.startswith(keys)}


def _plain(method: str) -> str:
    """The method that merges the same without class statistics, as `Method.plain`."""
    for ending in _STATISTICS:
        if method.endswith(ending):
            return f"{method.removesuffix(ending)}{_DRIFT}"
    return method


def _spread_joint(board: Leaderboard) -> None:
    """Let joint training, which is one run for any number of tasks, stand in all their columns."""
    for (stream, row), findings in list(board.cells.items()):
        if row.training != "joint":
            continue
        own = [
            replace(f, metrics={k: f.metrics[k] for k in WITHOUT_TASKS if k in f.metrics})
            for f in findings
        ]
        for other in board.streams:
            if replace(other, tasks=stream.tasks) == stream:
                board.cells.setdefault((other, row), own)


def _published(file: Path | None) -> list[Published]:
    """The paper's figures, and those of a file."""
    paper = [
        Published(name, float(accuracy), _SOURCE, data, tasks, _MODEL)
        for name, own in PAPER.items()
        for data, found in own.items()
        for tasks, accuracy in (found.items() if isinstance(found, dict) else [(None, found)])
    ]
    if file is None:
        return paper
    try:
        return paper + msgspec.convert(read_yaml(file), _PublishedFile).published
    except msgspec.ValidationError as error:
        raise InputError(
            f"{file}: {error}; expected a list 'published' of method, accuracy, source, data"
        ) from error
