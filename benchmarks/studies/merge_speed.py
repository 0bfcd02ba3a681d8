"""How fast files are merged, against the least that the machine needs for it.

    python -m cl_merge.benchmarks.studies.merge_speed
    python -m cl_merge.benchmarks.studies.merge_speed --model llm --gigabytes 8 --tasks 4

Makes a base and tasks of the size of ViT-B/16 on the disk and merges them with each method, each in
a process of its own; times are of the work, without the start of Python. The *floor*, measured in
turn with each of them, reads the same files once, adds them up and writes one file of the output's
size, in threads and in pieces that fit the cache. The *naive* rows are what one writes first: whole
state dicts in memory, one operation after another. For Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_merge.benchmarks.studies import harness
from cl_merge.kernels.parallel import in_threads
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import MERGERS, get_merger

METHODS = ("magmax", "average", "task-arithmetic", "random-mix", "ties")
NAIVE = ("naive magmax", "naive average", "naive ties")
_MODULE = "cl_merge.benchmarks.studies.merge_speed"
_PIECE = 1 << 20  # bytes that the floor reads at a time


def main() -> None:
    """Measure everything and print two tables."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where the inputs are made, and stay")
    parser.add_argument("--model", choices=("vit", "llm"), default="vit")
    parser.add_argument("--gigabytes", type=float, default=8, help="size of the llm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *NAIVE])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", help="measure one in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.only == "memory":
        harness.tell(fold_in_memory(arguments))
    elif arguments.only and arguments.folder:
        harness.tell(measure(arguments.only, arguments.folder, arguments.tasks))
    elif arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        _compare(arguments.folder, arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="merge-speed-") as folder:
            _compare(Path(folder), arguments)


def _compare(folder: Path, arguments: argparse.Namespace) -> None:
    make_inputs(folder, arguments)
    files = _files(folder, arguments.tasks)
    size = sum(file.stat().st_size for file in files)
    table = harness.new_table(
        f"{arguments.tasks} tasks of {size / len(files) / 1e9:.2f} GB, {arguments.dtype}, "
        f"{torch.get_num_threads()} threads, warm cache",
        "method", "seconds (range)", "GB/s", "floor, s", "x floor", "memory, MiB",
    )  # fmt: skip
    for method in [arguments.only] if arguments.only else arguments.methods:
        turns = harness.alternated(
            {
                name: partial(harness.alone, _MODULE, name, "--folder", str(folder))
                for name in ("floor", method)
            },
            arguments.repeat,
        )
        own = turns[method]
        took, least = (
            harness.Spread.of([r["seconds"] for r in rows]) for rows in (own, turns["floor"])
        )
        table.add_row(
            method,
            f"{took:.2f}",
            f"{(size + files[0].stat().st_size) / took.median / 1e9:.1f}",
            f"{least.median:.2f}",
            f"{took.median / least.median:.2f}",
            f"{max(run['memory'] for run in own):.0f}",
        )
    harness.show(table)
    if arguments.model == "vit":
        harness.show(_memory_table())


def _memory_table() -> Any:
    found = harness.alone(_MODULE, "memory")
    values, copy = found["values"], found["copy"]
    table = harness.new_table(
        f"one task vector into memory; copying moves {8 * values / copy / 1e9:.1f} GB/s",
        "method", "ms", "GB/s", "of copy",
    )  # fmt: skip
    for method in METHODS:
        kept = sum(dtype.itemsize for dtype in MERGERS[method].accumulators.values())
        speed = (4 + 2 * kept) * values / found[method]
        share = speed / (8 * values / copy)
        table.add_row(method, f"{1000 * found[method]:.0f}", f"{speed / 1e9:.1f}", f"{share:.0%}")
    return table


def make_inputs(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a base and tasks that moved a little from it, unless they are there."""
    dtype = getattr(torch, arguments.dtype)
    shapes = shapes_of(arguments.model, arguments.gigabytes, dtype)
    for index, file in enumerate(_files(folder, arguments.tasks)):
        if file.exists():
            continue
        generator = torch.Generator().manual_seed(0)
        moves = torch.Generator().manual_seed(index)
        tensors = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator).mul_(0.02)
            if index:
                tensor.add_(torch.randn(shape, generator=moves), alpha=1e-3)
            tensors[name] = tensor.to(dtype)
        save_file(tensors, file)


def shapes_of(model: str, gigabytes: float, dtype: torch.dtype) -> dict[str, torch.Size]:
    """Name the tensors of ``"vit"``, the image tower of ViT-B/16, or ``"llm"``, a decoder."""
    if model == "vit":
        import open_clip

        visual: Any = open_clip.create_model("ViT-B-16", load_weights=False).visual
        return {f"visual.{name}": tensor.shape for name, tensor in visual.state_dict().items()}
    width, inner, words = 4096, 11008, 32000
    layer = {f"attention.{name}": (width, width) for name in "qkvo"}
    layer |= {"mlp.gate": (inner, width), "mlp.up": (inner, width), "mlp.down": (width, inner)}
    found = {"embedding": torch.Size((words, width))}
    size = 0.0
    while size < gigabytes * 1e9:
        number = len(found) // 8
        found |= {f"layers.{number}.{name}": torch.Size(shape) for name, shape in layer.items()}
        found[f"layers.{number}.norm"] = torch.Size((width,))
        size = sum(shape.numel() for shape in found.values()) * dtype.itemsize
    return found


def measure(name: str, folder: Path, tasks: int) -> dict[str, float]:
    """Do one piece of work in this process; seconds, and peak memory beside maps in MiB."""
    output = folder / "merged.safetensors"
    for old in (output, folder / "floor.bin"):
        old.unlink(missing_ok=True)
    base, *tuned = _files(folder, tasks)
    work: Callable[[], object] = partial(merge_checkpoints, base, tuned, output, method=name)
    if name == "floor":
        work = partial(floor, folder, tasks)
    elif name.startswith("naive "):
        work = partial(naive, name.removeprefix("naive "), folder, tasks, output)
    with _peak_memory() as peak:
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "memory": peak()}


def floor(folder: Path, tasks: int) -> None:
    """Read all files once, add them up, and write one file of the size of one of them."""
    files = _files(folder, tasks)
    size = files[0].stat().st_size
    output = os.open(folder / "floor.bin", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    maps = [
        torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8) for file in files
    ]
    os.posix_fallocate(output, 0, size)

    def add(start: int) -> None:
        stop = min(start + _PIECE, size)
        length = (stop - start) // 4 * 4
        total = maps[0][start : start + length].view(torch.float32).clone()
        for one in maps[1:]:
            total.add_(one[start : start + length].view(torch.float32))
        os.pwrite(output, total.view(torch.uint8).numpy().data, start)

    in_threads(add, range(0, size, _PIECE))
    os.fsync(output)
    os.close(output)


def naive(method: str, folder: Path, tasks: int, output: Path) -> None:
    """Merge with whole state dicts in memory, as one writes it first."""
    base, *tuned = (load_file(file) for file in _files(folder, tasks))
    names = sorted(base)
    vectors = [{name: state[name] - base[name] for name in names} for state in tuned]
    if method == "magmax":
        merged = {name: vectors[0][name].clone() for name in names}
        for vector in vectors[1:]:
            for name in names:
                larger = vector[name].abs() >= merged[name].abs()
                merged[name] = torch.where(larger, vector[name], merged[name])
    elif method == "average":
        merged = {name: torch.stack([v[name] for v in vectors]).mean(dim=0) for name in names}
    else:
        merged = _naive_ties(vectors, names)
    save_file({name: base[name] + 0.5 * merged[name] for name in names}, output)


def _naive_ties(vectors: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    rows = torch.stack([torch.cat([v[name].flatten() for name in names]) for v in vectors])
    for row in rows:
        rank = len(row) - int(0.2 * len(row))
        row[row.abs() < row.abs().kthvalue(rank).values] = 0
    signs = rows.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    rows *= rows.sign() == signs
    flat = rows.sum(dim=0) / (rows != 0).sum(dim=0).clamp(min=1)
    parts = torch.split(flat, [vectors[0][name].numel() for name in names])
    return {n: part.view_as(vectors[0][n]) for n, part in zip(names, parts, strict=True)}


def fold_in_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Fold one task vector into each merger in memory; times are in seconds, the least of nine."""
    shapes = shapes_of(arguments.model, arguments.gigabytes, torch.float32)
    vectors = [
        {name: torch.randn(shape).mul_(1e-3) for name, shape in shapes.items()} for _ in range(2)
    ]
    flat = torch.randn(sum(shape.numel() for shape in shapes.values()))
    copy = torch.empty_like(flat)
    found = {"copy": _least(lambda: copy.copy_(flat)), "values": float(len(flat))}
    for method in METHODS:
        merger = get_merger(method)
        merger.update(vectors[0])
        found[method] = _least(partial(merger.update, vectors[1]))
    return found


def _files(folder: Path, tasks: int) -> list[Path]:
    names = ["base", *(f"task{index}" for index in range(tasks))]
    return [folder / f"{name}.safetensors" for name in names]


def _least(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=1, repeat=9))


@contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Watch the memory that is this process's own: pages of mapped files are the system's."""
    before, peak, done = _anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(0.0, peak - before)
    finally:
        done.set()
        watcher.join()


def _anonymous() -> float:
    """Anonymous memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
