"""Results of any number of runs and suites, also from other machines, joined into one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import msgspec
from msgspec import Struct

from cl_merge.benchmarks.formatting import counted, data_label
from cl_merge.benchmarks.methods.method import TRAININGS
from cl_merge.benchmarks.reports.summary import METRICS, PAPER, WITHOUT_TASKS
from cl_merge.benchmarks.runs.provenance import settings_of
from cl_merge.benchmarks.runs.results import Percent, read_results
from cl_merge.config.reading import read_yaml
from cl_merge.errors import InputError, listing

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
# Settings of methods: of all that merge, of the run's own, of one beside it, of a training.
_OF_ALL = ("merge.store", "merge.include", "merge.exclude", "merge.buffers")
_OF_OWN = ("merge.scale", "merge.groups", "merge.density", "merge.seed", "merge.options.")
_BESIDE = "merge.beside."
_TRAININGS = {t.name: f"{t.regularizer}." for t in TRAININGS.values() if t.regularizer}
_SOURCE = "Marczak et al., MagMax, ECCV 2024, tables 1 and 2"
_MODEL = "ViT-B-16-quickgelu:openai"
_STATISTICS = ("-statistics", "-aligned")


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
    for folder in folders:
        files = sorted(folder.rglob("results.json"))
        if not files:
            raise InputError(f"'{folder}' has no results.json in it or below it")
        for file in files:
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
            machine=", ".join(str(machine[k]) for k in ("device", "platform") if k in machine),
            seed=results["seed"],
            order=settings.get("stream.order", "natural"),
            metrics={"accuracy": found["accuracy"], **metrics, **cost},
        )
        row = Row(
            name, found["training"] or "none", _of_method(settings, name, found, results["method"])
        )
        cell = board.cells.setdefault((stream, row), [])
        # The pre-trained model is in every run, and says the same with the same seed.
        if name != "zero-shot" or all(f.metrics["accuracy"] != found["accuracy"] for f in cell):
            cell.append(finding)


def _of_stream(settings: Mapping[str, str]) -> tuple[str, ...]:
    words = {k: v for k, v in settings.items() if k not in _AXES}
    devices, batch = words.pop("trainer.devices", "1"), words.get("stream.batch_size", "")
    if devices.isdecimal() and batch.isdecimal():
        # Several devices share a step; what counts is how many images it has.
        words["stream.batch_size"] = str(int(devices) * int(batch))
    of_others = ("merge.", "loggers", *_TRAININGS.values())
    return tuple(sorted(f"{k}={v}" for k, v in words.items() if not k.startswith(of_others)))


def _of_method(
    settings: Mapping[str, str], method: str, found: Mapping[str, Any], own: str
) -> tuple[str, ...]:
    """The options of a method as words."""
    method, own = (_plain(name) for name in (method, own))
    starts = [_TRAININGS[found["training"]]] if found["training"] in _TRAININGS else []
    if found["merger"]:
        starts += [*_OF_ALL, *(_OF_OWN if method == own else (f"{_BESIDE}{method}.",))]
    words = {key: value for key, value in settings.items() if key.startswith(tuple(starts))}
    shown = (
        f"{k.removeprefix(f'{_BESIDE}{method}.').removeprefix('merge.').removeprefix('options.')}={v}"
        for k, v in words.items()
    )
    return tuple(sorted(shown))


def _plain(method: str) -> str:
    """The method that merges the same without class statistics."""
    for ending in _STATISTICS:
        method = method.removesuffix(ending)
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
