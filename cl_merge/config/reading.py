"""Reading the configuration of a run: from words, files and recipes to checked values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cl_merge.config.schema import EVALUATE, HELD_OUT, LOGGERS, RunConfig, described_keys
from cl_merge.config.trainer import check_trainer
from cl_merge.errors import InputError, nearest, unknown_name
from cl_merge.storage.files import is_no_file
from cl_merge.storage.quantize import STORES
from cl_merge.task_vectors.scales import Scales

# Of Lightning's `seed_everything`, which seeds numpy too.
_LARGEST_SEED = 2**32 - 1

# A value that cannot be read is part of a message; this much of it will do.
_LONGEST = 300


def read_config(
    arguments: Sequence[str],
    recipe: Mapping[str, Any],
    file: str | Path | None = None,
    *,
    origin: str = "the recipe of the data set",
) -> RunConfig:
    """Put a configuration together and check it: defaults, a recipe, a file, then arguments.

    Messages name where a wrong key or value comes from: `origin` is that of the recipe.

    Example:
        >>> read_config(["stream.tasks=10", "seed=3"], {}).stream.tasks
        10
    """
    config = _merged(OmegaConf.structured(RunConfig), recipe, origin)
    if file is not None:
        config = _merged(config, read_yaml(file), str(file))
    config = _merged(config, parse_arguments(arguments), "the command line")
    found: Any = OmegaConf.to_object(_resolved(config))
    _check_values(found)
    if found.stream.held_out is None:
        found.stream.held_out = HELD_OUT if found.merge.scale == "auto" else 0.0
    return found  # type: ignore[no-any-return]


@contextmanager
def settings_named(group: str) -> Iterator[None]:
    """Let the errors of a block name settings where the library names its arguments.

    Example:
        >>> with settings_named("optimizer"):
        ...     raise InputError("lr=-1; expected a finite number above 0")
        Traceback (most recent call last):
        ...
        cl_merge.errors.InputError: optimizer.lr=-1; expected a finite number above 0
    """
    arguments = "|".join(
        key.removeprefix(f"{group}.") for key in described_keys() if key.startswith(f"{group}.")
    )
    try:
        yield
    except InputError as error:
        error.args = (re.sub(rf"(?<![\w.])(?=({arguments})=)", f"{group}.", str(error)),)
        raise


def logger_options(loggers: Any) -> dict[str, dict[str, Any]] | None:
    """Read the setting ``loggers``: for each logger its options; None if nothing is said.

    Example:
        >>> logger_options(["csv", "wandb"])
        {'csv': {}, 'wandb': {}}
    """
    if loggers is None:
        return None
    if isinstance(loggers, str) or loggers is False:
        loggers = [loggers] if loggers else []
    if isinstance(loggers, (list, tuple)):
        loggers = {str(name): None for name in loggers}
    if not isinstance(loggers, Mapping):
        raise InputError(f"loggers={loggers}; expected a name, a list of names, or false")
    for name, options in loggers.items():
        if name not in LOGGERS:
            raise unknown_name("logger", name, LOGGERS)
        if options is not None and not isinstance(options, Mapping):
            raise InputError(f"loggers.{name}={options}; expected options of the logger, by name")
    return {name: dict(options or {}) for name, options in loggers.items()}


def parse_arguments(arguments: Sequence[str], example: str = "stream.tasks=5") -> dict[str, Any]:
    """Read ``key=value`` words into a tree of plain values; references stay as they are."""
    found = OmegaConf.create()
    for word in arguments:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip("-"):
            raise InputError(f"'{word}' is no setting; expected key=value, such as {example}")
        if key.startswith("-"):
            raise InputError(f"'{word}': settings are written without dashes: {word.lstrip('-')}")
        try:
            found.merge_with_dotlist([word])
        # OmegaConf passes on the errors of the YAML reader below it, which have no common base.
        except Exception as error:
            hint = "put quotes around text with brackets, braces or commas"
            raise InputError(f"cannot read '{word}' ({_first_line(error)}); {hint}") from error
    return OmegaConf.to_container(found)  # type: ignore[return-value]


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings; references stay as they are."""
    if is_no_file(file):
        raise InputError(f"config {file}: is no file; expected one of keys and values")
    try:
        found = OmegaConf.load(file)
    except OSError as error:
        # OmegaConf raises one, too, for what is neither keys and values nor a list.
        reason = error.strerror or error
        raise InputError(f"config {file}: cannot be read ({reason})") from error
    # As above: the errors of the YAML reader.
    except Exception as error:
        raise InputError(f"config {file}: no valid YAML ({_first_line(error)})") from error
    if not isinstance(found, DictConfig):
        raise InputError(f"config {file}: expected keys and values, found a list")
    return OmegaConf.to_container(found)  # type: ignore[return-value]


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML that `read_yaml` reads back."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Bring nested settings to one level; an empty mapping is a value.

    Example:
        >>> flat({"seed": 0, "stream": {"tasks": 5}})
        {'seed': 0, 'stream.tasks': 5}
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        found |= inner or {f"{prefix}{name}": value}
    return found


def _merged(config: DictConfig, layer: Mapping[str, Any], origin: str) -> DictConfig:
    """Put a layer over a configuration."""
    with suppress(TypeError, OmegaConfBaseException):
        return OmegaConf.unsafe_merge(config, dict(layer))  # type: ignore[return-value]
    # Key by key takes several times as long, but the error can name the key.
    for key, value in layer.items():
        try:
            config = OmegaConf.unsafe_merge(config, {str(key): value})  # type: ignore[assignment]
        except TypeError as error:
            raise InputError(
                f"{origin}: a list stands where keys and values are expected, or the other way "
                f"round ({key})"
            ) from error
        except ConfigKeyError as error:
            unknown = str(error.full_key)
            near = nearest(unknown, [*described_keys(), *flat({"trainer": RunConfig().trainer})])
            raise InputError(f"{origin}: unknown key '{unknown}'{near}") from error
        except OmegaConfBaseException as error:
            where = f"{error.full_key}: " if error.full_key else ""
            wants_list = "is not a ListConfig" in str(error)
            why = "expected a list, as in [a,b]" if wants_list else _first_line(error)
            raise InputError(f"{origin}: {where}{why}") from error
    return config


def _resolved(config: DictConfig) -> DictConfig:
    """Put values in the place of references, and check them as if they had been written there."""
    given = OmegaConf.to_container(config, resolve=False)
    if not any(mark in str(given) for mark in ("${", "???")):
        return config
    try:
        # Without types first: a reference to a value of the wrong type is then named below.
        tree = OmegaConf.create(given)
        plain: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    # What is only known now: a value left out as ???, or a reference to a key that there is not.
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {_first_line(error)}") from error
    return _merged(OmegaConf.structured(RunConfig), plain, "what a setting refers to")


def _check_values(config: RunConfig) -> None:
    for key, value in flat(asdict(config)).items():
        for number in value if isinstance(value, list) else [value]:
            # What torch can take and messages can show.
            if isinstance(number, int) and abs(number) >= 2**63:
                bits = number.bit_length()
                raise InputError(f"{key}: a number of {bits} bits; expected at most 63")
    check_trainer(config.trainer)
    logger_options(config.loggers)
    merge, seed = config.merge, config.seed
    if merge.scale not in ("auto", "drift"):
        try:
            Scales.read(merge.scale, 1.0)
        except InputError as error:
            hint = "expected a finite number, finite numbers by pattern, auto or drift"
            raise InputError(f"merge.scale={merge.scale}; {hint}") from error
    for name, options in merge.beside.items():
        if options is not None and not isinstance(options, Mapping):
            raise InputError(
                f"merge.beside.{name}={options}; expected options of the method and scale, by name"
            )
    if merge.groups and merge.scale != "auto":
        raise InputError(f"merge.groups={merge.groups}; only for merge.scale=auto")
    if merge.density is not None and not 0 < merge.density <= 1:
        raise InputError(f"merge.density={merge.density}; expected more than 0, at most 1")
    if merge.store not in STORES:
        raise unknown_name("value of merge.store", merge.store, STORES)
    if config.evaluate not in EVALUATE:
        raise unknown_name("value of evaluate", config.evaluate, EVALUATE)
    if not config.checkpoint_seconds >= 0:
        raise InputError(f"checkpoint_seconds={config.checkpoint_seconds}; expected 0 or more")
    if not 0 <= seed <= _LARGEST_SEED:
        most = "0 or more" if seed < 0 else f"at most {_LARGEST_SEED}"
        raise InputError(f"seed={seed}; expected {most}")


def _first_line(error: BaseException) -> str:
    # The reader of YAML says first what it was doing, then what is wrong and where.
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    text = f"{problem}, line {mark.line + 1}" if problem and mark else str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
