"""``cl-merge predict``: what a finished run sees in images."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cl_merge.cli.terminal import say
from cl_merge.errors import InputError

if TYPE_CHECKING:
    from cl_merge.models.predictor import Guess, ImageClassifier

HELP = "classify images with the model of a finished run"
DESCRIPTION = """\
Classify images with the model of a finished run. Single images make a table; a folder, searched at
all depths, makes CSV, one line for each image: file, class_1, probability_1, class_2 and so on. In
a folder a file that is no readable image is named and skipped, and the exit code is 1.
"""
EPILOG = """\
examples:
  cl-merge predict runs/digits-magmax seven.png eight.png
  cl-merge predict runs/photos holiday/ --top 3 --out holiday.csv
"""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
    add = command.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("images", metavar="IMAGE", nargs="+", help="images, or folders of images")
    add("--top", type=int, default=5, metavar="N", help="classes to name [5]")
    add("--out", "-o", "--output", metavar="FILE", help="write CSV there")
    add("--device", help="cpu, cuda or cuda:1 [cuda if there is one]")
    add("--batch-size", type=int, default=64, metavar="N", help="[64]")
    add("--method", help="another method of the run, with the same weights")
    command.set_defaults(execute=predict)


def predict(parsed: argparse.Namespace) -> int:
    """Classify images and show or write what was found; 1 if files were skipped."""
    for name, value in (("--top", parsed.top), ("--batch-size", parsed.batch_size)):
        if value < 1:
            raise InputError(f"{name} {value}; expected 1 or more")
    output = Path(parsed.out).expanduser() if parsed.out else None
    if output is not None and output.exists():
        raise InputError(f"the output '{output}' exists; give another name")
    given = [Path(image).expanduser() for image in parsed.images]
    files = [(file, path.is_dir()) for path in given for file in _images(path)]
    # What follows loads torch's libraries and a model, which takes seconds: wrong words first.
    import torch

    from cl_merge.benchmarks.runs.trained_run import load
    from cl_merge.storage.files import atomic_write

    device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    classifier = load(parsed.run, method=parsed.method, device=device)
    top, skipped = min(parsed.top, len(classifier.class_names)), list[Path]()
    found = _classified(classifier, files, top, parsed.batch_size, skipped)
    if output is not None:
        text = io.StringIO(newline="")
        _write_csv(text, found, top)
        with atomic_write(output) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    elif any(in_folder for _, in_folder in files):
        _write_csv(sys.stdout, found, top)
    else:
        _show_table(found, top)
    return 1 if skipped else 0


def _images(path: Path) -> list[Path]:
    """The images of a folder, at all depths and in order; of a file itself."""
    if not path.exists():
        raise InputError(f"there is no image '{path}'; check the path")
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not found:
        raise InputError(f"the folder '{path}' has no image ({', '.join(SUFFIXES)})")
    return found


def _classified(
    classifier: ImageClassifier,
    files: Sequence[tuple[Path, bool]],
    top: int,
    batch_size: int,
    skipped: list[Path],
) -> Iterator[tuple[Path, list[Guess]]]:
    """Classify files a batch at a time; those of folders that are no images are left out."""
    for start in range(0, len(files), batch_size):
        images, kept = [], []
        for file, in_folder in files[start : start + batch_size]:
            try:
                images.append(classifier.prepare(file))
                kept.append(file)
            except InputError as error:
                if not in_folder:
                    raise
                say(f"skipped: {error}")
                skipped.append(file)
        yield from zip(kept, classifier.predict(images, top, batch_size=batch_size), strict=True)


def _write_csv(file: TextIO, found: Iterable[tuple[Path, list[Guess]]], top: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    ranks = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]
    writer.writerow(["file", *ranks])
    for path, guesses in found:
        cells = [cell for guess in guesses for cell in (guess.name, f"{guess.probability:.6f}")]
        writer.writerow([str(path), *cells])


def _show_table(found: Iterable[tuple[Path, list[Guess]]], top: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for path, guesses in found:
        for rank, guess in enumerate(guesses):
            cells = ("" if rank else str(path), guess.name, f"{guess.probability:.1%}")
            table.add_row(*cells, end_section=rank == top - 1)
    Console(highlight=False, markup=False).print(table)
