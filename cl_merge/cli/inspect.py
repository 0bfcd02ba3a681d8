"""``cl-merge inspect``: look into checkpoints before merging them."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.formatting import counted
from cl_merge.cli.file_order import by_number
from cl_merge.errors import listing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cl_merge.merge_files.inspection import Inspection

HELP = "norms, zeros, sign conflicts, NaN, and what differs between checkpoints"
DESCRIPTION = """\
Look into checkpoints and task vectors: how far each task moved, what is zero, NaN or infinite,
which names, shapes and dtypes differ from the base, and how much the tasks agree with each other.

With --base, figures are those of the task vectors, weights minus base. Exit code 1 if something is
found that would keep the files from being merged.
"""
_BROKEN = "holds NaN or infinity"
_MOST_COLUMNS = 11  # of a table that fits a terminal


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
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
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    fit = "the parameters whose names fit, as in 'visual.*'"
    add("--include", **several, metavar="PATTERN", help=f"look only at {fit}")
    add("--exclude", **several, metavar="PATTERN", help=f"do not look at {fit}")
    about = "take this off the names of files that begin with it, but for those of the base"
    add("--strip-prefix", metavar="PREFIX", help=about)
    add("--layers", action="store_true", help="show the norm of every tensor, too")
    add("--json", action="store_true", help="print everything as JSON")
    command.set_defaults(execute=inspect)


def inspect(parsed: argparse.Namespace) -> int:
    """Inspect as the command line says; returns 1 if the files could not be merged as they are."""
    import msgspec
    from rich.console import Console

    from cl_merge.cli.terminal import byte_progress
    from cl_merge.merge_files.inspection import inspect_checkpoints

    with byte_progress(Console(stderr=True), "reading") as progress:
        found = inspect_checkpoints(
            by_number(parsed.files),
            parsed.base,
            include=parsed.include,
            exclude=parsed.exclude,
            density=parsed.density,
            strip_prefix=parsed.strip_prefix,
            progress=progress,
        )
    if parsed.json:
        # JSON has no paths, no NaN and no infinity; msgspec writes the last two as null.
        encoded = msgspec.json.encode(asdict(found) | {"fine": found.fine}, enc_hook=str)
        sys.stdout.write(json.dumps(msgspec.json.decode(encoded), indent=2) + "\n")
    else:
        _show(Console(highlight=False), found, layers=parsed.layers)
    return 0 if found.fine else 1


def _show(console: Console, found: Inspection, *, layers: bool) -> None:
    from rich.markup import escape

    for number, file in enumerate(found.files):
        values = f"{file.parameters / 1e6:,.2f} M" if file.parameters > 1e6 else file.parameters
        tensors, dtypes = counted(file.tensors, "tensor"), listing(file.dtypes)
        content = f"[dim]{file.kind}, {tensors}, {values} values, {dtypes}[/]"
        console.print(f"{number:<2} {escape(str(file.path))}  {content}", soft_wrap=True)
    console.print()
    console.print(f"[bold]{escape(_title(found))}[/]", soft_wrap=True)
    console.print(_overview(found))
    if len(found.files) > 1:
        _show_agreement(console, found)
    if layers:
        table = _table("tensor", *map(str, range(len(found.files))))
        for name in found.files[0].layers:
            table.add_row(escape(name), *(f"{file.layers[name]:.3g}" for file in found.files))
        console.print("\n[bold]norm by tensor[/]")
        console.print(table)
    if not found.fine:
        console.print("\n[bold red]cannot be merged as they are[/]")
    for path, text in _problems(found):
        console.print(f"[red]{escape(path)}[/]: {escape(text)}", soft_wrap=True)


def _title(found: Inspection) -> str:
    if found.base is not None:
        what = f"task vectors over {found.base}"
    elif found.are_changes:
        what = "task vectors"
    else:
        what = "weights as they are; --base shows what training changed"
    if any(f.missing or f.extra or f.shapes or f.uneven for f in found.files):
        what += f"; only the {counted(found.compared, 'tensor')} that all have alike"
    return what


def _overview(found: Inspection) -> Table:
    table = _table("", "norm", *(["of base's norm"] if found.base else []), "zeros", "largest")
    for number, file in enumerate(found.files):
        norm, largest = _number(file.norm, ".4g"), _number(file.largest, ".3g")
        relative = [_percent(file.relative)] if found.base else []
        table.add_row(str(number), norm, *relative, _percent(file.zeros), largest)
    return table


def _show_agreement(console: Console, found: Inspection) -> None:
    if len(found.files) <= _MOST_COLUMNS:
        table = _table("", *map(str, range(len(found.files) - 1)))
        for number, row in enumerate(found.cosines[1:], start=1):
            table.add_row(str(number), *(_number(cosine, ".2f") for cosine in row[:number]))
        console.print("[bold]cosine between tasks[/]")
        console.print(table)
    else:
        pairs = [(found.cosines[i][j], j, i) for i in range(len(found.files)) for j in range(i)]
        known = sorted(pair for pair in pairs if not math.isnan(pair[0]))
        if without := len(pairs) - len(known):
            console.print(f"{counted(without, 'pair')} with a task of zeros, which has no cosine")
        if known:
            (low, *fewest), (high, *most) = known[0], known[-1]
            mean = sum(cosine for cosine, *_ in known) / len(known)
            console.print(
                f"cosine between tasks: {mean:.2f} on average, from {low:.2f} ({fewest[0]} and "
                f"{fewest[1]}) to {high:.2f} ({most[0]} and {most[1]})\n",
                soft_wrap=True,
            )
    if found.are_changes:
        console.print(
            "sign conflicts, one task up and another down:\n"
            f"  {_percent(found.conflicts):>7} of all values that a task moves\n"
            f"  {_percent(found.top_conflicts):>7} of the largest {100 * found.density:g} % of "
            "each task, as TIES trims"
        )


def _problems(found: Inspection) -> list[tuple[str, str]]:
    """What keeps the files from being merged: which file, and what it is."""
    reference = "the base" if found.base else f"'{found.files[0].path}'"
    lines = [(found.base, _BROKEN, found.base_not_finite)]
    for file in found.files:
        lines += [
            (file.path, _BROKEN, file.not_finite),
            (file.path, "is quantised", file.quantised),
            (file.path, f"lacks tensors of {reference}", file.missing),
            (file.path, f"has tensors that {reference} lacks", file.extra),
            (file.path, f"differs from {reference}", file.shapes),
            (file.path, f"changes other tensors than '{found.files[0].path}'", file.uneven),
        ]
    return [(str(path), f"{what}: {listing(names)}") for path, what, names in lines if names]


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
