"""The loggers of a run: Lightning's own, opened so that a run that was stopped goes on in them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from typing_extensions import override

from cl_merge.benchmarks.runs.json_files import read_json
from cl_merge.config.reading import logger_options
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError, listing, nearest
from cl_merge.storage.files import atomic_write

Row = tuple[int, dict[str, float]]
"""A step, and by name what was logged at it."""


@dataclass(frozen=True)
class About:
    """What loggers are told of a run.

    Attributes:
        title: What it is called where runs have names.
        settings: Its hyper-parameters, plain values by name.
        headline: The name of the value that it is judged by.
    """

    title: str
    settings: Mapping[str, Any]
    headline: str


# What a run decides: names, the place in its folder, which run goes on, and that models stay there.
_DECIDED = {"self", "kwargs", "prefix", "experiment", "log_model", "checkpoint_name"}
_DECIDED |= {"save_dir", "dir", "version", "id", "run_id", "resume", "resume_from", "fork_from"}

# Of MLflow, as it was at first: a logger of it that is open sets this for the whole process.
_SERVER = os.environ.get("MLFLOW_TRACKING_URI")


def check_loggers(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Check that what a run shall log to is there and takes the options that are given.

    Args:
        config: The run; has ``loggers``.

    Returns:
        For each logger its options; nothing where ``loggers`` or ``trainer.logger`` is false.

    Raises:
        InputError: If a logger is unknown or not installed, or has no such option.

    Example:
        >>> check_loggers(RunConfig(loggers="csv"))
        {'csv': {}}
    """
    theirs = config.trainer.get("logger")
    if theirs not in (None, True, False):
        raise InputError(f"trainer.logger={theirs}; loggers= names what a run logs to")
    if theirs is False:
        return {}
    wanted = logger_options(config.loggers)
    if wanted is None:
        return {name: {} for name in ("csv", "tensorboard") if _installed(name)}
    for name, options in wanted.items():
        if not _installed(name):
            raise InputError(
                f"loggers={name}: package {BOOKS[name].package} is not installed: {_hint(name)}"
            )
        known = BOOKS[name].options()
        for option in options:
            if option not in known:
                raise InputError(
                    f"unknown option 'loggers.{name}.{option}'{nearest(option, known)} "
                    f"Known: {listing(known, limit=12)}"
                )
    return wanted


def open_books(
    wanted: Mapping[str, Mapping[str, Any]],
    place: Path,
    about: About,
    rows: Sequence[Row],
) -> list[Book]:
    """Open the loggers of a run, and give each what it lacks of what was logged before.

    Args:
        wanted: For each its options, checked.
        place: The folder of the run's logs.
        about: What they are told of the run.
        rows: What was logged before.

    Returns:
        The loggers.

    Raises:
        InputError: If one cannot be opened.
    """
    books: list[Book] = []
    try:
        for name, options in wanted.items():
            books.append(BOOKS[name](place, about, options))
            books[-1].begin(rows)
    # Servers, databases and what checks their options raise errors of every kind.
    except Exception as error:
        for book in books:
            # The one that failed may fail again.
            with suppress(Exception):
                book.close("failed")
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = f": {_hint(name)}" if isinstance(error, ImportError) else ""
        raise InputError(f"loggers.{name}: {reason}{hint}") from error
    return books


class Book(ABC):
    """One of Lightning's loggers, and what it holds already.

    Args:
        place: The folder of the run's logs.
        about: What it is told of the run.
        options: Of Lightning's logger, as far as a run leaves them open.

    Attributes:
        package: What must be installed for it.
        logger: Lightning's logger.
    """

    package: ClassVar[str]

    def __init__(self, place: Path, about: About, options: Mapping[str, Any]) -> None:
        self._about = about
        self._last: dict[str, int] = {}
        self.logger = self._make(place, options)

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options that it takes."""
        return []

    @abstractmethod
    def _make(self, place: Path, options: Mapping[str, Any]) -> Any:
        """Make Lightning's logger."""

    def begin(self, rows: Sequence[Row]) -> None:
        """Write the settings and the rows, as far as they are not there.

        Args:
            rows: What was logged before.
        """
        self.logger.log_hyperparams(dict(self._about.settings))
        self.write(rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Write what is not there yet.

        Args:
            rows: What was logged, in order.
        """
        for step, metrics in rows:
            new = {name: value for name, value in metrics.items() if step > self._held(name)}
            if new:
                self.logger.log_metrics(new, step)
                self._last |= dict.fromkeys(new, step)
        self.logger.save()

    def close(self, status: str) -> None:
        """Say that nothing follows.

        Args:
            status: ``"success"`` or ``"failed"``.
        """
        self.logger.finalize(status)

    def _held(self, name: str) -> int:
        """The last step at which it holds a value of a name; -1 if it holds none."""
        if name not in self._last:
            self._last[name] = self._stored(name)
        return self._last[name]

    def _stored(self, name: str) -> int:
        """The same, of what was there before it was opened."""
        return -1


class CsvBook(Book):
    """A table, ``metrics.csv``, which is written afresh when it is opened again."""

    package = "lightning"

    @override
    def _make(self, place: Path, options: Mapping[str, Any]) -> CSVLogger:
        return CSVLogger(place.parent, place.name, "csv")

    @override
    def begin(self, rows: Sequence[Row]) -> None:
        with warnings.catch_warnings():
            # It warns that it deletes the file of before, which is all in the rows.
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            super().begin(rows)


class TensorBoardBook(Book):
    """Event files, to which each start of a run adds one."""

    package = "tensorboard"

    @override
    def _make(self, place: Path, options: Mapping[str, Any]) -> TensorBoardLogger:
        return TensorBoardLogger(place.parent, place.name, "tensorboard", default_hp_metric=False)

    @override
    def begin(self, rows: Sequence[Row]) -> None:
        before = Path(self.logger.log_dir)
        if any(before.glob("events.out.tfevents.*")):
            reading = import_module("tensorboard.backend.event_processing.event_accumulator")
            # Of each name the last value only.
            events = reading.EventAccumulator(str(before), size_guidance={"scalars": 1}).Reload()
            for name in events.Tags()["scalars"]:
                self._last[name] = events.Scalars(name)[-1].step
        else:
            self._show_settings()
        super().begin(rows)

    def _show_settings(self) -> None:
        """Fill the page of hyper-parameters; Lightning would add a value of its own for that."""
        summary = import_module("torch.utils.tensorboard.summary")
        plain = (bool, int, float, str)
        settings = self._about.settings.items()
        shown = {key: value if isinstance(value, plain) else str(value) for key, value in settings}
        for part in summary.hparams(shown, {self._about.headline: 0.0}):
            self.logger.experiment._get_file_writer().add_summary(part)


class WandbBook(Book):
    """A run of Weights & Biases; its id is kept in the run's folder."""

    package = "wandb"

    @override
    @classmethod
    def options(cls) -> list[str]:
        return _parameters(WandbLogger.__init__, import_module("wandb").init)

    @override
    def _make(self, place: Path, options: Mapping[str, Any]) -> WandbLogger:
        file = place / "wandb.json"
        own: dict[str, Any] = {"project": "cl-merge", "name": self._about.title}
        # Drawn by the system: the generators of the run must not notice.
        run = _kept(file) or _keep(file, token_hex(4))
        return WandbLogger(**own | dict(options), save_dir=str(place), id=run, resume="allow")

    @override
    def begin(self, rows: Sequence[Row]) -> None:
        # Rows are counted there, one for each call: what a killed process had not sent is sent
        # again. Offline nothing is known of former processes, and each writes the whole run.
        held = self.logger.experiment.starting_step
        super().begin(rows[held:])

    @override
    def close(self, status: str) -> None:
        super().close(status)
        self.logger.experiment.finish(exit_code=0 if status == "success" else 1)


class MlflowBook(Book):
    """A run of MLflow; its id is kept in the run's folder, and where nothing is said its store."""

    package = "mlflow"

    @override
    @classmethod
    def options(cls) -> list[str]:
        return _parameters(MLFlowLogger.__init__)

    @override
    def _make(self, place: Path, options: Mapping[str, Any]) -> MLFlowLogger:
        own: dict[str, Any] = {"experiment_name": "cl-merge", "run_name": self._about.title}
        own["tracking_uri"] = _SERVER
        if not _SERVER and not options.get("tracking_uri"):
            store = (place / "mlflow").resolve()
            store.mkdir(parents=True, exist_ok=True)
            own["tracking_uri"] = f"sqlite:///{store / 'mlflow.db'}"
            own["artifact_location"] = (store / "artifacts").as_uri()
        self._file = place / "mlflow.json"
        run = _kept(self._file)
        self._new = run is None
        return MLFlowLogger(**own | dict(options), run_id=run)

    @override
    def begin(self, rows: Sequence[Row]) -> None:
        if self._new:
            _keep(self._file, self.logger.run_id)
            # Once: there, what was written cannot be changed.
            self.logger.log_hyperparams(dict(self._about.settings))
        else:
            self.logger.experiment.update_run(self.logger.run_id, status="RUNNING")
        self.write(rows)

    @override
    def _stored(self, name: str) -> int:
        if self._new:
            return -1
        history = self.logger.experiment.get_metric_history(self.logger.run_id, name)
        return max((metric.step for metric in history), default=-1)


BOOKS: dict[str, type[Book]] = {
    "csv": CsvBook,
    "tensorboard": TensorBoardBook,
    "wandb": WandbBook,
    "mlflow": MlflowBook,
}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(BOOKS[name].package) is not None


def _hint(name: str) -> str:
    return f'pip install "cl-merge[{name}]"'


def _parameters(*functions: Callable[..., Any]) -> list[str]:
    found = dict.fromkeys(name for each in functions for name in inspect.signature(each).parameters)
    return [name for name in found if name not in _DECIDED]


def _kept(file: Path) -> str | None:
    return (read_json(file) or {}).get("id")


def _keep(file: Path, name: str) -> str:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"id": name}) + "\n", encoding="utf-8")
    return name
