"""Merges that are killed, and merges whose memory is watched; in processes that are forked.

Run as ``python case_merge.py kill FOLDER`` or ``python case_merge.py memory FOLDER``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from pathlib import Path

import torch
from killing import child
from safetensors.torch import save_file

from cl_merge.merge_files import merge_checkpoints

MILLION = 1 << 20


def write(path: Path, size: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    generator = torch.Generator().manual_seed(seed)
    width = size // 8
    save_file({f"w{i}": torch.randn(width, generator=generator).to(dtype) for i in range(8)}, path)
    return path


def kill(folder: Path) -> dict[str, object]:
    """Merge into a file and into a folder, and kill it at some time; tell what is there then."""
    base, *tasks = (write(folder / f"{i}.safetensors", 8 * MILLION, i) for i in range(4))
    out = folder / "out"
    out.mkdir()
    draw, found = random.Random(0), []
    for name in ("m.safetensors", "m"):

        def work(name: str = name) -> None:
            merge_checkpoints(base, tasks, out / name, method="ties", shard_bytes=4 * MILLION)

        child(lambda: merge_checkpoints(base, tasks, out / "warm.safetensors"))
        (out / "warm.safetensors").unlink()
        whole = child(work)
        expected = contents(out)
        for seconds in [draw.uniform(0, whole * 0.95) for _ in range(6)]:
            remove(out)
            child(work, seconds)
            left = contents(out)
            seen = [name for name in left if not name.startswith(".")]
            found.append("whole" if left == expected else " ".join(seen) or "nothing")
        remove(out)
    return {"found": found}


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def memory(folder: Path) -> dict[str, float]:
    """Merge models of two sizes, and few and many tasks; tell the most memory of each in MB."""
    torch.set_num_threads(2)
    found = {}
    for name, size in (("small", 4 * MILLION), ("large", 24 * MILLION)):
        base, task, sparse = (folder / f"{name}-{i}.safetensors" for i in range(3))
        child(lambda: [write(base, size, 0), write(task, size, 1)])  # noqa: B023
        child(lambda: mostly_zero(base, task, sparse))  # noqa: B023
        cases = [(1, "ties", task), (1, "ties", sparse)]
        if name == "small":
            cases += [(12, "ties", task), (12, "magmax", task)]
        for number, method, each in cases:
            report = folder / "peak"

            def work(files=(base, each, number), method=method, report=report) -> None:
                start, tasks = anonymous(), [files[1]] * files[2]
                with Peak() as peak:
                    merge_checkpoints(files[0], tasks, folder / "m.safetensors", method=method)
                report.write_text(str(peak.most - start))

            child(work)
            kind = "sparse " if each == sparse else ""
            found[f"{kind}{name} {method} {number}"] = float(report.read_text()) / MILLION
            report.unlink()
            (folder / "m.safetensors").unlink()
    return found


def mostly_zero(base: Path, task: Path, path: Path) -> None:
    """Write weights that differ from the base in one tensor of eight."""
    from safetensors.torch import load_file

    save_file({**load_file(base), "w3": load_file(task)["w3"]}, path)


class Peak:
    """Watches the memory that is this process's own."""

    def __enter__(self) -> Peak:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, anonymous())


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    found = {"kill": kill, "memory": memory}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)
