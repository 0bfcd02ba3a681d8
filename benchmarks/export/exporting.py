"""Export the classifier of a finished run."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cl_merge.benchmarks.export.card import write_card
from cl_merge.benchmarks.export.export_folder import export_folder
from cl_merge.benchmarks.export.side_files import write_beside
from cl_merge.benchmarks.runs.trained_run import FinishedRun, read_run, restore
from cl_merge.errors import InputError, unknown_name


class Format(NamedTuple):
    """One way to write a model.

    Attributes:
        module: The module of this package that does it; imported when it is asked for. Its
            ``reason`` says why a run's model cannot be written, None if it can; its ``write``
            writes a restored model into a folder and compares what it wrote with it.
        votes: Whether it can hold class statistics that vote beside the text head.
        needs: Packages that are not installed with this one.
        extra: The extra that brings them.
    """

    module: str
    votes: bool = False
    needs: tuple[str, ...] = ()
    extra: str = ""


FORMATS: dict[str, Format] = {
    "open_clip": Format("open_clip_folder"),
    "huggingface": Format("huggingface_folder", needs=("transformers",), extra="export"),
    "torch": Format("torch_program", votes=True),
    "onnx": Format(
        "onnx_graph",
        votes=True,
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="export",
    ),
}
"""The formats by name."""


def export(folder: str | Path, form: str, output: str | Path, *, method: str | None = None) -> Path:
    """Write the classifier of a finished run into a folder that needs no `cl_merge` to be used.

    Beside the model the folder has ``classes.json``, ``preprocessing.json`` and a model card,
    ``README.md``. What was written is read again and compared with the run's model before the
    folder gets its name: it is there whole, or not at all.

    Args:
        folder: Of the run.
        form: One of `FORMATS`.
        output: The new folder; it may exist, empty.
        method: Which of the run's methods, as of `cl_merge.load`; None for its own.

    Returns:
        The folder.

    Raises:
        InputError: If the run is not finished or damaged, the format is unknown, lacks a library or
            cannot hold the model, or the output is there already.
        StorageError: If it cannot be written.

    Example::

        export("runs/digits-magmax", "onnx", "exported/digits")
    """
    if form not in FORMATS:
        raise unknown_name("format", form, FORMATS)
    run = read_run(folder, method)
    _check_possible(run, form)
    _check_installed(form)
    with export_folder(output, run.path) as temporary:
        restored = restore(run)
        _module(form).write(restored, temporary)
        classes = write_beside(restored, temporary)
        write_card(restored, form, classes, temporary)
    return Path(output).expanduser()


def _check_possible(run: FinishedRun, form: str) -> None:
    why = _reason(run, form)
    if why is None:
        return
    others = [name for name in FORMATS if name != form and _reason(run, name) is None]
    raise InputError(
        f"format {form} cannot hold method '{run.method}' with model '{run.config.model}': {why}; "
        f"formats that can: {', '.join(others)}"
    )


def _reason(run: FinishedRun, form: str) -> str | None:
    """Why a format cannot hold a run's model; None if it can."""
    if not run.plain and not FORMATS[form].votes:
        return (
            "it has no place for class statistics that vote beside the text head (those of a "
            "method that ends in -aligned are in the image tower)"
        )
    found: str | None = _module(form).reason(run)
    return found


def _check_installed(form: str) -> None:
    missing = [name for name in FORMATS[form].needs if find_spec(name) is None]
    if missing:
        raise InputError(
            f"format {form} needs the package '{missing[0]}', which is not installed: "
            f'pip install "cl-merge[{FORMATS[form].extra}]"'
        )


def _module(form: str) -> Any:
    return importlib.import_module(f"cl_merge.benchmarks.export.{FORMATS[form].module}")
