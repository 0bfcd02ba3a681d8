"""Run work in forked processes, kill them anywhere, and let others go on.

Run as ``python killing.py CASE FOLDER``; a process of its own imports everything once, so that each
victim starts in no time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

FOREVER = 1e9


def child(work: Callable[[], object], seconds: float = FOREVER, writes: int = 0) -> float:
    """Do work in a forked process; kill it after some seconds, or at its n-th write.

    An odd number of writes is counted in flushes to the disk, in the middle of writing a file; an
    even one in renames, just before a new file takes the place of the old one.
    """
    begin = time.monotonic()
    process = os.fork()
    if process == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if writes:
            _die_at("fsync" if writes % 2 else "replace", (writes + 1) // 2)
        code = 1
        try:
            code = 0 if work() in (0, None) else 1
        finally:
            os._exit(code)
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() - begin > seconds:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            break
        time.sleep(0.002)
    return time.monotonic() - begin


def _die_at(name: str, number: int) -> None:
    original, calls = getattr(os, name), [0]

    def counted(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, name, counted)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    module, folder = sys.argv[1], Path(sys.argv[2])
    # What to do with a folder, and what it then holds, as plain values.
    case = importlib.import_module(module)
    points, by_write = int(sys.argv[3]), int(sys.argv[4])
    whole = child(lambda: case.work(folder / "whole"))
    found = {"whole": case.outcome(folder / "whole"), "seconds": whole, "states": [], "killed": {}}
    draw = random.Random(0)
    for number in range(points // 2):
        place = folder / f"random-{number}"
        at = sorted(draw.uniform(0, whole) for _ in range(2))
        # The second kill falls where the run would be after the first, or in what it repeats.
        for seconds in (at[0], at[1] - at[0]):
            child(lambda place=place: case.work(place), seconds)
            found["states"].append(case.state(place))
        child(lambda place=place: case.work(place))
        found["killed"][f"after {at[0]:.2f} and {at[1]:.2f} s"] = case.outcome(place)
    for number in range(by_write):
        place, write = folder / f"write-{number}", draw.randint(1, case.WRITES)
        child(lambda place=place: case.work(place), writes=write)
        found["states"].append(case.state(place))
        child(lambda place=place: case.work(place))
        found["killed"][f"at write {write}"] = case.outcome(place)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
