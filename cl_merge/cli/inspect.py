"""``cl-merge inspect``: look into checkpoints before merging them."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.errors import listing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cl_merge.engine.inspection import FileReport, Inspection

_DESCRIPTION = """\
Look into checkpoints and task vectors: how far each task moved, what is zero, NaN or infinite,
which names, shapes and dtypes differ from the base, and how much the tasks agree with each other.

With --base, figures are those of the task vectors, weights minus base. Exit code 1 if something is
found that would keep the files from being merged.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line.

    Args:
        commands: Where the commands are.
    """
    command = commands.add_parser(
        "inspect",
        help="norms, zeros, sign conflicts, NaN, and what differs between checkpoints",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("files", nargs="+", metavar="FILE", help="fine-tuned weights or task vectors")
    add("--base", metavar="FILE", help="the weights before fine-tuning")
    add(
        "--density",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of each task vector that counts as its largest values [0.2]",
    )
    add("--layers", action="store_true", help="show the norm of every tensor, too")
    add("--json", action="store_true", help="print everything as JSON")
    command.set_defaults(execute=inspect)


def inspect(parsed: argparse.Namespace) -> int:
    """Inspect as the command line says.

    Args:
        parsed: The arguments.

    Returns:
        0, or 1 if the files could not be merged as they are.

    Raises:
        InputError: If an argument is wrong or a file is damaged.
    """
    from rich.console import Console

    from cl_merge.cli.progress import byte_progress
    from cl_merge.engine.inspection import inspect_checkpoints

    with byte_progress(Console(stderr=True), "reading") as progress:
        found = inspect_checkpoints(
            parsed.files, parsed.base, density=parsed.density, progress=progress
        )
    if parsed.json:
        sys.stdout.write(json.dumps(_plain(asdict(found)), indent=2) + "\n")
    else:
        _show(Console(highlight=False), found, layers=parsed.layers)
    return 0 if found.fine else 1


def _show(console: Console, found: Inspection, *, layers: bool) -> None:
    from rich.markup import escape

    console.print(_overview(found))
    for file in found.files:
        for text in _problems(file, "the base" if found.base else "the first file"):
            console.print(f"[bold red]{escape(str(file.path))}[/]: {escape(text)}", soft_wrap=True)
    if len(found.files) > 1:
        console.print(_agreement(found))
        console.print(
            f"sign conflicts: {_percent(found.conflicts)} of all positions that move, "
            f"{_percent(found.top_conflicts)} among the largest {_percent(found.density)} of each "
            "task"
        )
    if layers:
        console.print(_by_layer(found))


def _overview(found: Inspection) -> Table:
    table = _table(
        f"task vectors over {found.base}" if found.base else "as they are, without a base",
        "file", "kind", "tensors", "parameters", "dtype", "norm",
        *(["of base"] if found.base else []), "zeros", "largest",
    )  # fmt: skip
    for number, file in enumerate(found.files):
        table.add_row(
            f"{number}  {file.path.name}",
            file.kind,
            str(file.tensors),
            f"{file.parameters / 1e6:.2f} M",
            listing(file.dtypes),
            f"{file.norm:.4g}",
            *([f"{file.relative:.2%}"] if found.base else []),
            _percent(file.zeros),
            f"{file.largest:.3g}",
        )
    return table


def _problems(file: FileReport, reference: str) -> list[str]:
    return [
        f"{what}: {listing(names)}"
        for what, names in (
            ("NaN or infinity in", file.not_finite),
            (f"lacks tensors of {reference}", file.missing),
            (f"has tensors that are not in {reference}", file.extra),
            (f"differs from {reference}", file.shapes),
        )
        if names
    ]


def _agreement(found: Inspection) -> Table:
    table = _table("cosine between tasks", "", *map(str, range(len(found.files))))
    for number, row in enumerate(found.cosines):
        table.add_row(str(number), *(f"{cosine:.2f}" for cosine in row))
    return table


def _by_layer(found: Inspection) -> Table:
    table = _table("norm by tensor", "tensor", *map(str, range(len(found.files))))
    for name in found.files[0].layers:
        table.add_row(name, *(f"{file.layers[name]:.3g}" for file in found.files))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _plain(value: Any) -> Any:
    """What JSON can hold: it knows neither paths nor NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
