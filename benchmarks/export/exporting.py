"""Export the classifier of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cl_merge.benchmarks.export import graphs, huggingface_folder, open_clip_folder
from cl_merge.benchmarks.export.card import write_card
from cl_merge.benchmarks.export.side_files import write_side_files
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored, read_run, restore
from cl_merge.errors import InputError, unknown_name
from cl_merge.storage import check_output
from cl_merge.storage.files import atomic_folder


class Format(NamedTuple):
    """One way to write a model."""

    # Writes a restored model into a folder, and compares what it wrote with it.
    write: Callable[[Restored, Path], None]
    # Says why a run's model cannot be written, None if it can.
    reason: Callable[[FinishedRun], str | None] = lambda run: None
    # Whether it can hold class statistics that vote beside the text head.
    votes: bool = False
    # Packages of the extra `export` that it needs.
    needs: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "open_clip": Format(open_clip_folder.write, open_clip_folder.reason),
    "huggingface": Format(
        huggingface_folder.write, huggingface_folder.reason, needs=("transformers",)
    ),
    "torch": Format(graphs.write_torch, votes=True),
    "onnx": Format(
        graphs.write_onnx,
        graphs.onnx_reason,
        votes=True,
        needs=("onnx", "onnxscript", "onnxruntime"),
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
    run, path = read_run(folder, method), Path(output).expanduser()
    _check_possible(run, form)
    if path.suffix == ".safetensors":
        raise InputError(f"the output '{path}' is named like a file; an export is a folder")
    check_output(path, [run.path])
    with atomic_folder(path) as temporary:
        restored = restore(run)
        FORMATS[form].write(restored, temporary)
        classes = write_side_files(restored, temporary)
        write_card(restored, form, classes, temporary)
    return path


def _check_possible(run: FinishedRun, form: str) -> None:
    why = _reason(run, form)
    if why is not None:
        others = [name for name in FORMATS if _reason(run, name) is None]
        raise InputError(
            f"format {form} cannot hold method '{run.method}' with model '{run.config.model}': "
            f"{why}; formats that can: {', '.join(others)}"
        )
    missing = [name for name in FORMATS[form].needs if find_spec(name) is None]
    if missing:
        raise InputError(
            f"format {form} needs the package '{missing[0]}', which is not installed: "
            'pip install "cl-merge[export]"'
        )


def _reason(run: FinishedRun, form: str) -> str | None:
    """Why a format cannot hold a run's model; None if it can."""
    if not run.plain and not FORMATS[form].votes:
        return (
            "it has no place for class statistics that vote beside the text head (those of a "
            "method that ends in -aligned are in the image tower)"
        )
    return FORMATS[form].reason(run)
