"""The loggers of a run: Lightning's own, opened so that a run that was stopped goes on in them."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

from cl_merge.benchmarks.runs.results import read_json
from cl_merge.config.reading import logger_options
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError, listing, nearest
from cl_merge.storage.files import atomic_write


@dataclass(frozen=True)
class RunInfo:
    """What loggers are told of a run."""

    title: str  # what it is called where runs have names
    settings: dict[str, Any]  # its hyper-parameters, plain values by name
    folder: Path  # of its logs


@dataclass(frozen=True)
class LoggerAdapter:
    """How one of Lightning's loggers is opened for a run, anew or in the entry that it had."""

    package: str  # must be installed for it
    open: Callable[[RunInfo, Mapping[str, Any]], Logger]
    options_of: Callable[[], list[Callable[..., Any]]] = list  # functions whose options it takes


# What a run decides: names, folders, which entry goes on, and that models stay in its folder.
_DECIDED = {"self", "kwargs", "prefix", "experiment", "log_model", "checkpoint_name"}
_DECIDED |= {"save_dir", "dir", "version", "id", "run_id", "resume", "resume_from", "fork_from"}

# Of MLflow, as it was at first: a logger of it that is open sets this for the whole process.
_SERVER = os.environ.get("MLFLOW_TRACKING_URI")


def check_loggers(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Check what a run shall log to: for each logger its options, if it is there and takes them.

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
        adapter = ADAPTERS[name]
        if not _installed(name):
            reason = f"package {adapter.package} is not installed: {_hint(name)}"
            raise InputError(f"loggers={name}: {reason}")
        taken = {o for each in adapter.options_of() for o in inspect.signature(each).parameters}
        known = sorted(taken - _DECIDED)
        for option in options:
            if option not in known:
                raise InputError(
                    f"unknown option 'loggers.{name}.{option}'{nearest(option, known)} "
                    f"Known: {listing(known, limit=12)}"
                )
    return wanted


def open_loggers(wanted: Mapping[str, Mapping[str, Any]], info: RunInfo) -> list[Logger]:
    """Open loggers with their options, which have been checked."""
    opened: list[Logger] = []
    try:
        for name, options in wanted.items():
            opened.append(ADAPTERS[name].open(info, options))
    # Servers, databases and what checks their options raise errors of every kind.
    except Exception as error:
        for logger in opened:
            with suppress(Exception):
                close_logger(logger, "failed")
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = f": {_hint(name)}" if isinstance(error, ImportError) else ""
        raise InputError(f"loggers.{name}: {reason}{hint}") from error
    return opened


def close_logger(logger: Logger, status: str) -> None:
    """Say that nothing follows; the status is ``"success"`` or ``"failed"``."""
    logger.finalize(status)
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=0 if status == "success" else 1)


def _open_csv(info: RunInfo, options: Mapping[str, Any]) -> CSVLogger:
    file = info.folder / "csv" / "metrics.csv"
    # A line without its end was cut off, and so may be a number in it.
    text = file.read_text().rpartition("\n")[0] if file.exists() else ""
    rows = list(csv.DictReader(text.splitlines()))
    logger = CSVLogger(info.folder.parent, info.folder.name, "csv")
    with warnings.catch_warnings():
        # It warns that it deletes the file of before, whose rows follow.
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        logger.log_hyperparams(info.settings)
    for row in rows:
        step = int(row.pop("step"))
        logger.log_metrics({name: float(value) for name, value in row.items() if value}, step)
    logger.save()
    return logger


def _open_tensorboard(info: RunInfo, options: Mapping[str, Any]) -> TensorBoardLogger:
    folder = info.folder / "tensorboard"
    # The page of hyper-parameters needs a value, which Lightning adds: hp_metric, once.
    new = not any(folder.glob("events.out.tfevents.*"))
    place = info.folder.parent, info.folder.name, folder.name
    logger = TensorBoardLogger(*place, default_hp_metric=new)
    logger.log_hyperparams(info.settings)
    return logger


def _open_wandb(info: RunInfo, options: Mapping[str, Any]) -> WandbLogger:
    file = info.folder / "wandb.json"
    # Drawn by the system: the generators of the run must not notice.
    run = _kept_id(file) or token_hex(4)
    _keep_id(file, run)
    given = {"project": "cl-merge", "name": info.title} | dict(options)
    logger = WandbLogger(**given, save_dir=str(info.folder), id=run, resume="allow")
    logger.log_hyperparams(info.settings)
    return logger


def _open_mlflow(info: RunInfo, options: Mapping[str, Any]) -> MLFlowLogger:
    given: dict[str, Any] = {"experiment_name": "cl-merge", "run_name": info.title}
    given["tracking_uri"] = _SERVER
    if not _SERVER and not options.get("tracking_uri"):
        store = (info.folder / "mlflow").resolve()
        store.mkdir(parents=True, exist_ok=True)
        given["tracking_uri"] = f"sqlite:///{store / 'mlflow.db'}"
        given["artifact_location"] = (store / "artifacts").as_uri()
    file = info.folder / "mlflow.json"
    run = _kept_id(file)
    logger = MLFlowLogger(**given | dict(options), run_id=run)
    if run is None:
        _keep_id(file, str(logger.run_id))
        # Once: there, what was written cannot be changed.
        logger.log_hyperparams(info.settings)
    else:
        logger.experiment.update_run(logger.run_id, status="RUNNING")
    return logger


ADAPTERS = {
    "csv": LoggerAdapter("lightning", _open_csv),
    "tensorboard": LoggerAdapter("tensorboard", _open_tensorboard),
    "wandb": LoggerAdapter(
        "wandb", _open_wandb, lambda: [WandbLogger.__init__, import_module("wandb").init]
    ),
    "mlflow": LoggerAdapter("mlflow", _open_mlflow, lambda: [MLFlowLogger.__init__]),
}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(ADAPTERS[name].package) is not None


def _hint(name: str) -> str:
    return f'pip install "cl-merge[{name}]"'


def _kept_id(file: Path) -> str | None:
    return (read_json(file) or {}).get("id")


def _keep_id(file: Path, run: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"id": run}) + "\n", encoding="utf-8")
