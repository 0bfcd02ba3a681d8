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
from statistics import median
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file

from cl_merge.benchmarks.studies import harness
from cl_merge.kernels.parallel import in_threads
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import MERGERS, get_merger, reference

METHODS = ("magmax", "average", "task-arithmetic", "random-mix", "ties")
NAIVE = ("naive magmax", "naive average", "naive ties")
_PIECE = 1 << 20  # bytes that the floor reads at a time


def main() -> None:
    """Measure everything and print two tables."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where the inputs are made, and stay")
    parser.add_argument("--model", choices=("vit", "llm"), default="vit")
    parser.add_argument("--gigabytes", type=float, default=8, help="size of the llm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--only", nargs="+", metavar="METHOD", default=[*METHODS, *NAIVE])
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-speed-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _compare(make_inputs(folder, arguments), arguments)
    if arguments.model == "vit":
        _show_memory()


def _compare(files: list[Path], arguments: argparse.Namespace) -> None:
    size, rows = sum(file.stat().st_size for file in files), []
    for method in arguments.only:
        works = {name: partial(harness.alone, measure, name, files) for name in ("floor", method)}
        turns = harness.alternated(works, arguments.repeat)
        took, busy, memory = zip(*turns[method], strict=True)
        least, least_busy, _ = (median(part) for part in zip(*turns["floor"], strict=True))
        figures = [f"{median(took) / least:.2f}", harness.spread(busy, 2)]
        figures += [f"{median(busy) / least_busy:.2f}", f"{max(memory):.0f}"]
        rows.append([method, harness.spread(took, 2), *figures])
    harness.show(
        f"{arguments.tasks} tasks of {size / len(files) / 1e9:.2f} GB, {arguments.dtype}, "
        f"{torch.get_num_threads()} threads, warm cache",
        ["method", "seconds", "x floor", "of processors", "x floor", "memory, MiB"],
        rows,
    )


def _show_memory() -> None:
    values, copy, folds = harness.alone(fold_in_memory)
    copied, rows = 8 * values / copy, []
    for method, seconds in folds.items():
        kept = sum(dtype.itemsize for dtype in MERGERS[method].accumulators.values())
        speed = (4 + 2 * kept) * values / seconds
        figures = [f"{1000 * seconds:.0f}", f"{speed / 1e9:.1f}", f"{speed / copied:.0%}"]
        rows.append([method, *figures])
    title = f"one task vector into memory; copying moves {copied / 1e9:.1f} GB/s"
    harness.show(title, ["method", "ms", "GB/s", "of copy"], rows)


def make_inputs(folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Write a base and tasks that moved a little from it, unless they are there."""
    dtype = getattr(torch, arguments.dtype)
    shapes = vit_shapes()
    if arguments.model == "llm":
        shapes = llm_shapes(arguments.gigabytes * 1e9 / dtype.itemsize)
    names = ["base", *(f"task{index}" for index in range(arguments.tasks))]
    files = [folder / f"{name}.safetensors" for name in names]
    for index, file in enumerate(files):
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
    return files


def vit_shapes() -> dict[str, torch.Size]:
    """Name the tensors of the image tower of ViT-B/16, with their shapes."""
    visual: Any = open_clip.create_model("ViT-B-16", load_weights=False).visual
    return {f"visual.{name}": tensor.shape for name, tensor in visual.state_dict().items()}


def llm_shapes(values: float) -> dict[str, torch.Size]:
    """Name the tensors of a decoder of at least so many values, with their shapes."""
    width, inner = 4096, 11008
    layer: dict[str, tuple[int, ...]] = {f"attention.{n}": (width, width) for n in "qkvo"}
    layer |= {"mlp.gate": (inner, width), "mlp.up": (inner, width), "mlp.down": (width, inner)}
    layer["norm"] = (width,)
    found, number = {"embedding": torch.Size((32000, width))}, 0
    while number == 0 or sum(shape.numel() for shape in found.values()) < values:
        found |= {f"layers.{number}.{name}": torch.Size(shape) for name, shape in layer.items()}
        number += 1
    return found


def measure(name: str, files: list[Path]) -> tuple[float, float, float]:
    """Do one piece of work in this process.

    Returns seconds on the clock, those of all processors, and peak memory beside maps in MiB.
    """
    output, (base, *tuned) = files[0].with_name("merged.safetensors"), files
    floor_output = output.with_name("floor.bin")
    for old in (output, floor_output):
        old.unlink(missing_ok=True)
    work: Callable[[], object] = partial(merge_checkpoints, base, tuned, output, method=name)
    if name == "floor":
        work = partial(floor, files, floor_output)
    elif name.startswith("naive "):
        work = partial(naive, name.removeprefix("naive "), files, output)
    with _peak_memory() as peak:
        begin, busy = time.perf_counter(), time.process_time()
        work()
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return seconds, busy, peak()


def floor(files: list[Path], output: Path) -> None:
    """Read all files once, add them up, and write one file of the size of one of them."""
    size = files[0].stat().st_size
    maps = [torch.from_file(str(file), size=size, dtype=torch.uint8) for file in files]
    with output.open("wb") as sink:
        os.posix_fallocate(sink.fileno(), 0, size)

        def add(start: int) -> None:
            stop = start + (min(_PIECE, size - start)) // 4 * 4
            first, *others = (one[start:stop].view(torch.float32) for one in maps)
            total = first.clone()
            for other in others:
                total.add_(other)
            os.pwrite(sink.fileno(), total.view(torch.uint8).numpy().data, start)

        in_threads(add, range(0, size, _PIECE))
        os.fsync(sink.fileno())


def naive(method: str, files: list[Path], output: Path) -> None:
    """Merge with whole state dicts in memory, as one writes it first."""
    base, *tuned = (load_file(file) for file in files)
    vectors = [{name: state[name] - value for name, value in base.items()} for state in tuned]
    if method == "ties":
        flat = (torch.cat([value.flatten() for value in one.values()]) for one in vectors)
        rows = torch.cat([reference.trim(row[None], density=0.2) for row in flat])
        elected = reference.merge_elected(rows, reference.elect_sign(rows))
        parts = torch.split(elected, [value.numel() for value in base.values()])
        merged = {n: part.view_as(base[n]) for n, part in zip(base, parts, strict=True)}
    else:
        rule = {"magmax": reference.magmax, "average": reference.average}[method]
        merged = {name: rule(torch.stack([one[name] for one in vectors])) for name in base}
    save_file({name: value + 0.5 * merged[name] for name, value in base.items()}, output)


def fold_in_memory() -> tuple[int, float, dict[str, float]]:
    """Fold one task vector of ViT-B/16 into each merger in memory.

    Returns its number of values, the seconds of a copy, and of a fold by method: the least of nine.
    """
    shapes = vit_shapes()
    first, second = (
        {name: torch.randn(shape).mul_(1e-3) for name, shape in shapes.items()} for _ in range(2)
    )
    flat = torch.randn(sum(shape.numel() for shape in shapes.values()))
    copy, found = torch.empty_like(flat), {}
    for method in METHODS:
        merger = get_merger(method)
        merger.update(first)
        found[method] = _least(partial(merger.update, second))
    return len(flat), _least(partial(copy.copy_, flat)), found


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
