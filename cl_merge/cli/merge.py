"""``cl-merge merge``: merge checkpoints that were trained anywhere, from files to a file."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cl_merge.benchmarks.formatting import counted
from cl_merge.cli.file_order import by_number
from cl_merge.errors import InputError, listing, unknown_name

if TYPE_CHECKING:
    from cl_merge.merge_files import Merged

HELP = "merge checkpoints, from files to a file"
HINT = "Options of a method follow --set, as in --set density=0.3"
DESCRIPTION = """\
Merge fine-tuned checkpoints into the base that they were fine-tuned from.

The base and each task are a safetensors file, a folder with shards, a Hugging Face or open_clip
folder, a checkpoint of PyTorch or Lightning (file.pt:KEY for one of several in it), or a model of
the Hugging Face hub (org/name or org/name@revision); a task may also be a LoRA adapter of peft, or
a task vector that cl-merge run wrote. Files may be larger than memory. The output is one file if
its name ends in .safetensors, else a folder that loads as the base's does.
"""
_EXAMPLES = """\
examples:
  cl-merge merge base.safetensors task0.safetensors task1.safetensors --out merged.safetensors
  cl-merge merge base/ task0/ task1/ task2/ --method ties --set density=0.3 --out merged/
  cl-merge merge base.pt task*.pt --scale 0.5 --scale 'visual.*attn*=0.3' --out merged.safetensors
  cl-merge merge base.safetensors task*.safetensors --method mine.py:median --out merged.safetensors
  cl-merge merge --no-base adapter0/ adapter1/ --lora-rank 16 --out merged_adapter/
  cl-merge merge --no-base one.safetensors two.safetensors --method average --out soup.safetensors
"""
_ARGUMENTS = {
    "method",
    "scale",
    "include",
    "exclude",
    "importance",
    "buffers",
    "lora-rank",
    "dtype",
    "overwrite",
}
_BUFFERS = {"trained": "of the last task", "base": "of the base", "average": "averaged"}
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command can be told."""
    command.epilog = _EXAMPLES + "\n" + _method_help()
    add = command.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    about = "the weights before fine-tuning; with --no-base the first file"
    add("base", nargs="?", metavar="BASE", help=about)
    about = "fine-tuned weights, or task vectors, in order; by number if the shell lists task*"
    add("files", nargs="*", metavar="TASK", help=about)
    about = "a YAML file of mergekit, in place of files, method, scale, weights and options"
    add("--config", metavar="FILE", help=about)
    about = "merge weights as they are, by average, slerp, karcher, fisher or regmean"
    add("--no-base", action="store_true", help=about)
    # --output was its name before.
    names, about = ("-o", "--out", "--output"), "file.safetensors, or a folder"
    add(*names, dest="out", required=True, metavar="OUT", help=about)
    add("--method", metavar="NAME", help="see below, or FILE.py:NAME [magmax]")
    add(
        "--scale",
        action="append",
        metavar="NUMBER",
        help="factor of the merged task vector, or PATTERN=NUMBER for parameters by name; may be "
        "repeated, the first pattern that fits counts; lines:LOW:HIGH grows from the first block "
        "to the last [the one the method was published with]",
    )
    about = "a factor of each task vector, in their order, negative to take away [1 each]"
    add("--weight", nargs="+", type=float, default=[], metavar="NUMBER", help=about)
    add("--set", **several, metavar="KEY=VALUE", help="options of the method, as in density=0.3")
    fit = "the parameters whose names fit, as in 'visual.*'"
    add("--include", **several, metavar="PATTERN", help=f"merge only {fit}")
    add("--exclude", **several, metavar="PATTERN", help=f"do not merge {fit}")
    add(
        "--buffers",
        metavar="WHICH",
        help="batch-norm statistics and the like: trained (the last task's), base, or average over "
        "tasks [trained, with a message]",
    )
    add("--dtype", metavar="DTYPE", help="of the output: float32, bfloat16 or float16 [the base's]")
    about = "take this off the names of tasks that begin with it and that the base has not"
    add("--strip-prefix", metavar="PREFIX", help=f"{about}, as in model.")
    about = "for methods that weigh, as fisher and regmean: one file for each task"
    add("--importance", **several, metavar="FILE", help=about)
    add(
        "--lora-rank",
        metavar="RANK",
        help="of LoRA adapters, make one of this rank, a folder of peft, instead of merged "
        "weights; auto for the sum of their ranks",
    )
    add("--shard-size", default="5GB", metavar="SIZE", help="most of one file in a folder [5GB]")
    add("--overwrite", action="store_true", help="replace an output file that exists")
    command.set_defaults(execute=merge)


def merge(parsed: argparse.Namespace) -> None:
    """Merge as the command line says, and tell what was done."""
    from rich.console import Console

    from cl_merge.cli.terminal import byte_progress, show_messages
    from cl_merge.merge_files import merge_checkpoints

    arguments, shard_bytes = _arguments(parsed), read_size(parsed.shard_size)
    console = Console(stderr=True, highlight=False)
    show_messages(console)
    with byte_progress(console, "merging") as progress:
        done = merge_checkpoints(
            output=parsed.out,
            include=parsed.include,
            exclude=parsed.exclude,
            importances=by_number(parsed.importance),
            buffers=parsed.buffers,
            strip_prefix=parsed.strip_prefix,
            lora_rank=read_rank(parsed.lora_rank),
            shard_bytes=shard_bytes,
            overwrite=parsed.overwrite,
            progress=progress,
            **arguments,
        )
    base = "base" if arguments["base"] is not None else "first file"
    sys.stdout.write(_summary(done, len(arguments["tasks"]), base) + "\n")


def _arguments(parsed: argparse.Namespace) -> dict[str, Any]:
    """What is merged and how: as the words say, or a file of mergekit."""
    from cl_merge.cli.mergekit import read_mergekit
    from cl_merge.config.reading import parse_arguments

    own = {
        **{"BASE": parsed.base, "--no-base": parsed.no_base, "--method": parsed.method},
        **{"--scale": parsed.scale, "--weight": parsed.weight, "--set": parsed.set},
    }
    if parsed.config is not None:
        if beside := [word for word, value in own.items() if value]:
            raise InputError(f"--config says what {listing(beside)} would say; give one of the two")
        found = read_mergekit(parsed.config)
        return found | ({"dtype": parsed.dtype} if parsed.dtype is not None else {})
    if not parsed.files:
        raise InputError("give BASE and at least one TASK, or --config FILE")
    files = [parsed.base, *parsed.files] if parsed.no_base else parsed.files
    options, method = parse_arguments(parsed.set, "density=0.3"), parsed.method or "magmax"
    _check_options(method, options)
    return {
        "base": None if parsed.no_base else parsed.base,
        "tasks": by_number(files),
        "method": method,
        "scale": read_scale(parsed.scale),
        "weights": parsed.weight,
        "dtype": parsed.dtype,
        **options,
    }


def _check_options(method: str, options: Any) -> None:
    import inspect

    from cl_merge.mergers.registry import find_merger

    known = inspect.signature(find_merger(method)).parameters
    for option in options:
        if option not in known:
            unknown = unknown_name(f"option of method '{method}'", option, known)
            hint = f"; without --set: --{option}" if option in _ARGUMENTS else ""
            raise InputError(f"{unknown}{hint}")


def _summary(done: Merged, tasks: int, base: str) -> str:
    made = done.provenance
    merged, of_tasks = counted(done.merged, "tensor"), counted(tasks, "task")
    copied = f", {done.copied} taken from the {base}" if done.copied else ""
    if done.buffers:
        whose = _BUFFERS[made["cl_merge.buffers"]].replace("base", base)
        copied += f", {counted(done.buffers, 'buffer')} {whose}"
    options = json.loads(made["cl_merge.options"])
    given = {key: value for key, value in options.items() if value is not None}
    words = f" ({', '.join(f'{key}={value}' for key, value in given.items())})" if given else ""
    size, speed = done.bytes_read, done.bytes_read / max(done.seconds, 1e-9)
    if fit := done.adapter:
        of_tasks += (
            f" into an adapter of rank {fit.rank}\nrelative error {fit.error:.2g}, at most "
            f"{fit.worst:.2g} ({fit.worst_name})"
        )
    return (
        f"{done.path}: {merged} merged from {of_tasks}{copied}\n"
        f"method {made['cl_merge.method']}{words}, scale "
        f"{made['cl_merge.scale']}; read {_bytes(size)} in {done.seconds:.1f} s, {_bytes(speed)}/s"
    )


def _bytes(number: float) -> str:
    for unit, size in reversed(_SIZES.items()):
        if number >= size:
            return f"{number / size:.3g} {f'{unit}B' if unit else 'bytes'}"
    return "0 bytes"


def read_scale(
    words: list[str] | None,
) -> float | dict[str, float] | Callable[[list[str]], dict[str, float]] | None:
    """Read what ``--scale`` was given: numbers, or patterns with numbers; None for the default.

    ``lines:LOW:HIGH`` makes a function of names.

    Example:
        >>> read_scale(["visual.*=0.3", "0.5"])
        {'visual.*': 0.3, '*': 0.5}
    """
    if not words:
        return None
    if any(word.startswith("lines:") for word in words):
        return _read_lines(words)
    found: dict[str, float] = {}
    for word in words:
        pattern, equals, number = word.rpartition("=")
        key = pattern if equals else "*"
        if key in found:
            of_what = f" for '{key}'" if equals else ""
            raise InputError(f"--scale is given twice{of_what}; give it once")
        try:
            found[key] = float(number)
        except ValueError:
            raise InputError(
                f"--scale {word}: expected a number, or PATTERN=NUMBER as in 'visual.*=0.3'"
            ) from None
    # The rest comes last, wherever it was said.
    if "*" in found:
        found["*"] = found.pop("*")
    return found["*"] if list(found) == ["*"] else found


def _read_lines(words: list[str]) -> Callable[[list[str]], dict[str, float]]:
    from cl_merge.task_vectors.scales import lines_scales

    try:
        (word,) = words
        low, high = (float(number) for number in word.split(":")[1:])
    except ValueError:
        given = " ".join(f"--scale {word}" for word in words)
        raise InputError(f"{given}: expected lines:LOW:HIGH alone, as in lines:0.2:1") from None
    return partial(lines_scales, low=low, high=high)


def read_rank(word: str | None) -> int | Literal["auto"] | None:
    """Read what ``--lora-rank`` was given."""
    if word is None:
        return None
    if word == "auto":
        return "auto"
    try:
        return int(word)
    except ValueError:
        raise InputError(f"--lora-rank {word}: expected a whole number, or auto") from None


def read_size(word: str) -> int:
    """Read a number of bytes, as in ``"5GB"``.

    Example:
        >>> read_size("1.5 GB")
        1500000000
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)B?", word.strip().upper())
    number = float(match[1]) * _SIZES[match[2]] if match else 0
    if number < 1:
        raise InputError(f"--shard-size {word}: expected a size such as 5GB or 500MB")
    return int(number)


def _method_help() -> str:
    import inspect

    from cl_merge.mergers import MERGERS

    lines = ["methods, their published scales and their options:"]
    for name, merger in MERGERS.items():
        found = inspect.signature(merger).parameters.values()
        options = ", ".join(f"{option.name}={option.default}" for option in found)
        row = f"  {name:<18}{merger.published_scale:<6g}{options}"
        lines.append(textwrap.fill(row, 98, subsequent_indent=" " * 26, drop_whitespace=True))
    return "\n".join(lines) + "\n"
