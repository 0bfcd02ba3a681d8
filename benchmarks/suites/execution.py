"""Run the jobs of a suite, side by side on this machine."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, FAILURE, Job, state_of
from cl_merge.errors import InputError
from cl_merge.kernels.parallel import usable_cores
from cl_merge.storage.files import atomic_write

LOG = "log.txt"
"""What a job says, in its folder."""

COMMAND = (sys.executable, "-m", "cl_merge.cli")

PATIENCE = 20.0
"""Seconds that an interrupted job has to end by itself."""

_INTERRUPTED = (130, 143)  # exit codes after Ctrl-C and after SIGTERM
_LAST_WORDS = 4000  # bytes of a log in which the reason of a failure is looked for


@dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Attributes:
        job: Which.
        state: `DONE`, `FAILED`, or `BEGUN` if it was interrupted.
        seconds: How long it ran this time.
        reason: What it said last, if it failed.
    """

    job: Job
    state: str
    seconds: float
    reason: str = ""


def run_here(jobs: Sequence[Job], folder: Path, parallel: int | None = None) -> Iterator[Ended]:
    """Run jobs as processes of this machine, several side by side.

    Each process sees one GPU, where there are some, and its share of the cores.

    Args:
        jobs: What to run, in this order.
        folder: The suite's.
        parallel: How many at a time; None for one for each GPU, and one without any.

    Yields:
        Each job as it ends. One that fails does not stop the others.

    Raises:
        InputError: If `parallel` is less than 1.
    """
    gpus = _visible_gpus()
    number = parallel if parallel is not None else max(len(gpus), 1)
    if number < 1:
        raise InputError(f"--parallel {number}; expected 1 or more")
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for slot in range(number):
        slots.put(_environment(slot, number, gpus))

    def run(job: Job) -> Ended:
        environment = slots.get()
        try:
            return run_job(job, folder, environment)
        finally:
            slots.put(environment)

    _running.stopped = False
    pool = ThreadPoolExecutor(number)
    waiting = {pool.submit(run, job) for job in jobs}
    try:
        yield from _as_they_end(waiting)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _running.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_job(job: Job, folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Run one job as a process of its own, whatever happens to it.

    Args:
        job: What to run.
        folder: The suite's.
        environment: Variables to set for it.

    Returns:
        How it ended.
    """
    place = folder / job.place
    place.mkdir(parents=True, exist_ok=True)
    (place / FAILURE).unlink(missing_ok=True)
    with atomic_write(place / "job.yaml") as temporary:
        temporary.write_text(
            str(OmegaConf.to_yaml(OmegaConf.create(dict(job.config)))), encoding="utf-8"
        )
    words = ["run", "--config", str(place / "job.yaml"), f"out={place}"]
    began = time.monotonic()
    with (place / LOG).open("ab") as log:
        log.write(f"cl-merge {' '.join(words)}\n".encode())
        log.flush()
        code = _running.call(
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Out of the terminal's reach: Ctrl-C comes from here, once.
            process_group=0,
            env={**os.environ, **(environment or {}), "COLUMNS": "100"},
        )
    seconds = time.monotonic() - began
    if code == 0 and state_of(job, folder) == DONE:
        return Ended(job, DONE, seconds)
    if code in _INTERRUPTED or _running.stopped:
        return Ended(job, BEGUN, seconds)
    return failed(job, folder, _reason(place / LOG, code), seconds)


def failed(job: Job, folder: Path, reason: str, seconds: float) -> Ended:
    """Note in the folder of a job that it failed.

    Args:
        job: Which.
        folder: The suite's.
        reason: Why.
        seconds: How long it ran.

    Returns:
        How it ended.
    """
    with atomic_write(folder / job.place / FAILURE) as temporary:
        failure = {"reason": reason, "seconds": round(seconds, 1)}
        temporary.write_text(json.dumps(failure, indent=2) + "\n", encoding="utf-8")
    return Ended(job, FAILED, seconds, reason)


def _as_they_end(waiting: set[Future[Ended]]) -> Iterator[Ended]:
    while waiting:
        ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ended:
            yield future.result()


class _Running:
    """The processes of the moment, so that they can be stopped together."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def call(self, command: list[str], **options: Any) -> int:
        """Run a command to its end; its exit code."""
        with subprocess.Popen(command, **options) as process:  # noqa: S603 - our own command
            self._processes.add(process)
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    def stop(self) -> None:
        """Interrupt them as Ctrl-C does; those that do not hear it are killed, which they survive.

        What was started in the background of a shell ignores interruptions, and so does what it
        starts: it is asked to end in another way.
        """
        self.stopped = True
        left = list(self._processes)
        for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, PATIENCE / 4)):
            end = time.monotonic() + patience
            for process in left:
                process.send_signal(number)
            left = [process for process in left if not _ends(process, end)]
        for process in left:
            process.kill()


def _ends(process: subprocess.Popen[bytes], end: float) -> bool:
    """Wait for a process until some time; whether it has ended."""
    try:
        process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return False
    return True


_running = _Running()


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip() and gpu.strip() != "-1"]
    return [str(number) for number in range(torch.cuda.device_count())]


def _environment(slot: int, slots: int, gpus: list[str]) -> dict[str, str]:
    found = (
        {}
        if "OMP_NUM_THREADS" in os.environ
        else {"OMP_NUM_THREADS": str(max(usable_cores() // slots, 1))}
    )
    # One job alone keeps all GPUs: it may train on several.
    if gpus and slots > 1:
        found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return found


def _reason(log: Path, code: int) -> str:
    """The last thing a process said, or what ended it."""
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    lines = log.read_bytes()[-_LAST_WORDS:].decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    ours = [line for line in said if line.startswith("cl-merge: ")]
    last = ours[-1] if ours else said[-1] if said else ""
    return last.removeprefix("cl-merge: ") or f"exit code {code}"
