"""Run work in forked processes, kill them anywhere, and let others go on.

Run as ``python killing.py CASE FOLDER PAIRS WRITES...``; a process of its own imports everything
once, so that each victim starts in no time.
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
from collections.abc import Callable, Iterable
from pathlib import Path

FOREVER = 1e9
MANY = 20


def child(work: Callable[[], object], seconds: float = FOREVER, writes: int = 0) -> float | None:
    """Do work in a forked process; kill it after some seconds, or at its n-th write.

    An odd number of writes is counted in flushes to the disk, in the middle of writing a file; an
    even one in renames, just before a new file takes the place of the old one.

    Returns:
        How many seconds it took, or None if it was killed.
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
    while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() - begin > seconds:
            os.kill(process, signal.SIGKILL)
            found = os.waitpid(process, 0)
            break
        time.sleep(0.002)
    return None if os.WIFSIGNALED(found[1]) else time.monotonic() - begin


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
    # What to do with a folder, and what it then holds, as plain values.
    case, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    whole = child(lambda: case.work(folder / "whole"))
    found = {"whole": case.outcome(folder / "whole"), "states": [], "killed": {}}

    def kill_and_go_on(name: str, kills: Iterable[dict[str, float]]) -> None:
        place = folder / name
        for kill in kills:
            if child(lambda: case.work(place), **kill) is not None:
                break
            found["states"].append(case.state(place))
        else:
            child(lambda: case.work(place))
        found["killed"][name] = case.outcome(place)

    draw = random.Random(0)
    for _ in range(int(sys.argv[3])):
        first, second = sorted(draw.uniform(0, whole) for _ in range(2))
        # The second kill falls where the run would be after the first, or in what it repeats.
        kills = [{"seconds": first}, {"seconds": second - first}]
        kill_and_go_on(f"after {first:.2f} and {second:.2f} s", kills)
    # Killed at once, then again and again, each time some writes further on.
    for writes in map(int, sys.argv[4:]):
        kills = [2 - writes % 2] + MANY * [writes]
        kill_and_go_on(f"at every write {writes}", [{"writes": write} for write in kills])
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
