"""What a run found: the one schema that writes and reads ``results.json``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from cl_merge.errors import InputError
from cl_merge.storage.files import is_no_file

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Scale = Number | Annotated[dict[str, Number], Meta(min_length=1)] | None
Matrix = Annotated[list[Annotated[list[Percent | None], Meta(min_length=1)]], Meta(min_length=1)]


class TaskResults(Struct):
    """A task of the run."""

    name: str
    classes: Annotated[list[Count], Meta(min_length=1)]  # labels
    class_names: Annotated[list[str], Meta(min_length=1)]
    train_images: Count
    test_images: Count
    held_out_images: Count = 0

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.class_names):
            raise ValueError(f"{len(self.classes)} classes, {len(self.class_names)} class_names")


class MethodResults(Struct, omit_defaults=True):
    """What was found for a method, in per cent."""

    accuracy: Percent
    metrics: dict[str, Number | None]
    matrix: Matrix  # a row for each evaluation, a column for each task
    matrix_task_aware: Matrix
    seen: Annotated[list[Percent | None], Meta(min_length=1)]  # null where it was not evaluated
    training: str | None
    merger: str | None
    scale: Scale  # after the last task
    statistics: str | None = None
    # By the name of a data set beside the stream, its accuracy after each evaluation.
    probes: dict[str, Annotated[list[Percent], Meta(min_length=1)]] = {}
    chosen_scales: Annotated[list[Scale], Meta(min_length=1)] | None = None  # one for each task


class CostResults(Struct):
    """What something took."""

    seconds: Amount
    peak_memory: Count
    peak_device_memory: Count


class Results(Struct, omit_defaults=True):
    """The content of ``results.json``."""

    method: str
    seed: Count
    data: str
    model: str
    scenario: str
    tasks: Annotated[list[TaskResults], Meta(min_length=1)]
    methods: dict[str, MethodResults]
    training: dict[str, Annotated[list[CostResults], Meta(min_length=1)]]
    total: CostResults
    finished: str | None = None
    command: str | None = None  # that does the run again; older runs did not say
    commit: str | None = None  # of the code
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for name in (self.method, "zero-shot"):
            if name not in self.methods:
                raise ValueError(f"methods.{name} is missing")
        tasks = len(self.tasks)
        for name, method in self.methods.items():
            for key in ("matrix", "matrix_task_aware"):
                rows = getattr(method, key)
                if len(rows) > tasks or any(len(row) != tasks for row in rows):
                    raise ValueError(f"methods.{name}.{key} is not of {tasks} tasks")
            if len(method.seen) != tasks:
                raise ValueError(f"methods.{name}.seen is not of {tasks} tasks")


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read what a finished run found, as plain values; None if no run has finished there.

    Raises:
        InputError: If the file cannot be read or is damaged; names the entry.
    """
    return read_json(folder / "results.json", Results)


def finished_results(folder: Path) -> dict[str, Any]:
    """Read what a run found; as `read_results`, but an error if it has not finished."""
    results = read_results(folder)
    if results is not None:
        return results
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder; expected that of a finished run")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"'{folder}' holds no run: there is no config.yaml")
    raise InputError(f"the run in '{folder}' is not finished; go on with: {resume_command(folder)}")


def resume_command(folder: Path) -> str:
    """The command by which a run goes on, as a shell reads it.

    Example:
        >>> resume_command(Path("runs/my photos"))
        "cl-merge run 'out=runs/my photos'"
    """
    return shlex.join(["cl-merge", "run", f"out={folder}"])


def read_json(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any] | None:
    """Read a file that holds an object, as plain values; None if there is no such file.

    `InputError` names the entry where it is not of a kind, a type that msgspec knows.
    """
    if is_no_file(path):
        raise InputError(f"'{path}' is no file; take it away")
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror})") from error
    try:
        found: dict[str, Any] = msgspec.json.decode(content)
        msgspec.convert(found, kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is damaged: {error}; restore it, or delete it") from error
    return found


def as_json(value: Any) -> Any:
    """Turn a value into what JSON gives back; numbers that are not finite become None.

    Example:
        >>> as_json({1: (0.5, float("nan"))})
        {'1': [0.5, None]}
    """
    return msgspec.json.decode(msgspec.json.encode(value))
