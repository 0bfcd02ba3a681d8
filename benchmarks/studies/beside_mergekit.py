"""Whole commands beside each other: cl-merge merge and mergekit-yaml, on the same checkpoints.

    python -m venv peers && peers/bin/pip install mergekit==0.1.5
    python -m cl_merge.benchmarks.studies.beside_mergekit peers/bin/mergekit-yaml
    python -m cl_merge.benchmarks.studies.beside_mergekit peers/bin/mergekit-yaml --size large

Makes a base and tasks as folders of Llamas: small ones of the size of ViT-B/16 in float32, or
larger ones in bfloat16 and shards. Both commands merge them by turns, from start to end, reading
from a warm cache. Seconds on the clock depend on what else the machine does; those of the
processors, user and system, hardly do. Memory is the largest resident set, which counts pages of
mapped files too. For Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cl_merge.benchmarks.studies import harness
from cl_merge.benchmarks.studies.parity import llama_config, llama_shapes
from cl_merge.storage import write_weights

_SHARD = 300_000_000
_SIZES = {
    "small": (torch.float32, {"width": 768, "inner": 3072, "layers": 8, "words": 7000}),
    "large": (torch.bfloat16, {"width": 2048, "inner": 5632, "layers": 7, "words": 32000}),
}
# What both call the method, and the options with which they compute the same.
METHODS: Mapping[str, tuple[str, Sequence[str], Mapping[str, Any]]] = {
    "linear": ("average", [], {}),
    "task_arithmetic": ("task-arithmetic", ["--scale", "1"], {"normalize": False, "lambda": 1.0}),
    "ties": (
        "ties",
        ["--scale", "1", "--set", "per_parameter=true"],
        {"density": 0.2, "normalize": True},
    ),
}


class Took(NamedTuple):
    """What a command took: seconds on the clock and of processors, and memory in MB."""

    wall: float
    cpu: float
    memory: float


def main() -> None:
    """Measure everything and print a table."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("mergekit", type=Path, help="where mergekit-yaml is")
    parser.add_argument("--size", choices=tuple(_SIZES), default="small")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the inputs are made, and stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="beside-mergekit-") as temporary:
        folder = given.folder or Path(temporary)
        names = make_inputs(folder, given.size, given.tasks)
        rows = [row for method in given.only for row in _compared(method, folder, names, given)]
    title = f"{given.tasks} tasks and their base, {given.size}, {torch.get_num_threads()} threads"
    columns = ["method", "command", "seconds", "of processors", "memory, MB"]
    harness.show(title, columns, rows)


def _compared(
    method: str, folder: Path, names: list[str], given: argparse.Namespace
) -> list[list[str]]:
    own, words, parameters = METHODS[method]
    inputs = [str(folder / name) for name in names]
    out = folder / "merged"
    given_here = inputs if method != "linear" else ["--no-base", *inputs[1:]]
    here = ["-m", "cl_merge.cli", "merge", *given_here, "--method", own, *words, "--out", str(out)]
    config: dict[str, Any] = {
        "merge_method": method,
        "dtype": str(_SIZES[given.size][0]).removeprefix("torch."),
        "models": [{"model": task, "parameters": {"weight": 1.0}} for task in inputs[1:]],
        "parameters": dict(parameters),
    }
    if method != "linear":
        config["base_model"] = inputs[0]
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(config))  # which is YAML too
    there = [str(given.mergekit), str(path), str(out), "--quiet"]
    works: dict[str, Callable[[], Took]] = {
        "cl-merge": partial(timed_command, [sys.executable, *here], out),
        "mergekit": partial(timed_command, there, out),
    }
    turns = harness.alternated(works, given.repeat)
    rows = []
    for name, took in turns.items():
        wall, cpu, memory = zip(*took, strict=True)
        figures = [harness.spread(wall, 1), harness.spread(cpu, 1), f"{max(memory):.0f}"]
        rows.append([method, name, *figures])
    middle = [
        [statistics.median(part) for part in zip(*took, strict=True)] for took in turns.values()
    ]
    ratios = [theirs / ours for ours, theirs in zip(*middle, strict=True)]
    return [*rows, ["", "mergekit / cl-merge", *(f"{ratio:.1f} x" for ratio in ratios)]]


def timed_command(command: Sequence[str], out: Path) -> Took:
    """Run a command to its end; its output is thrown away."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:  # noqa: S603
        assert process.stderr is not None  # noqa: S101
        complained = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {complained.strip()[-500:]}")
    shutil.rmtree(out)
    unit = 1e6 if sys.platform == "darwin" else 1024 / 1e6
    return Took(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if unit == 1e6 else unit))


def make_inputs(folder: Path, size: str, tasks: int) -> list[str]:
    """Write a base and tasks that moved a little from it, unless they are there."""
    dtype, sizes = _SIZES[size]
    shapes = llama_shapes(**sizes)
    config = llama_config(**sizes) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    names = [f"{size}-base", *(f"{size}-task{task}" for task in range(tasks))]
    entries = {name: (dtype, torch.Size(shape)) for name, shape in shapes.items()}
    for index, name in enumerate(names):
        if (folder / name).exists():
            continue
        start, moves = torch.Generator().manual_seed(0), torch.Generator().manual_seed(index)
        with write_weights(folder / name, entries, {}, shard_bytes=_SHARD) as writer:
            for key, shape in shapes.items():
                tensor = torch.randn(shape, generator=start).mul_(0.02)
                if index:
                    tensor.add_(torch.randn(shape, generator=moves), alpha=1e-3)
                writer.write(key, 0, tensor.to(dtype))
        (folder / name / "config.json").write_text(json.dumps(config))
    return names


if __name__ == "__main__":
    main()
