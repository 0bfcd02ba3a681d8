"""``cl-merge export``: a finished run as a folder that other programs load."""

from __future__ import annotations

import argparse

HELP = "write a finished run's model for open_clip, transformers, torch or ONNX"
DESCRIPTION = """\
Write the classifier of a finished run into a folder that works without cl-merge, with the names of
its classes, its preprocessing and a model card. What was written is read again and compared with
the run's model; the folder is there whole or not at all.
"""
EPILOG = """\
formats:
  open_clip     image and text tower, for open_clip (local-dir:FOLDER)
  huggingface   image and text tower, for transformers (CLIPModel, CLIPProcessor)
  torch         images to logits, for torch alone (torch.export.load)
  onnx          images to logits, for ONNX runtimes

Class statistics that vote beside the text head are in torch and onnx only; those of methods that
end in -aligned are in the image tower, and in any format.

examples:
  cl-merge export runs/digits-magmax --format onnx --out exported/digits
  cl-merge export runs/photos-magmax-aligned --format huggingface --out exported/photos
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
    add = command.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("--format", required=True, metavar="FORMAT", help="see below")
    add("--out", "-o", "--output", required=True, metavar="FOLDER", help="a new folder")
    add("--method", help="another method of the run, with the same weights")
    command.set_defaults(execute=export)


def export(parsed: argparse.Namespace) -> None:
    """Export a run and say where it is."""
    from rich.console import Console

    from cl_merge.benchmarks.export import export as write

    folder = write(parsed.run, parsed.format, parsed.out, method=parsed.method)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    Console(highlight=False, soft_wrap=True).print(
        f"{folder} is the model, {size:.1f} MB: {', '.join(path.name for path in files)}; "
        "README.md shows how to load it",
        markup=False,
    )
