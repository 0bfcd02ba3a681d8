"""Run the jobs of a suite: side by side on this machine, or through submitit on many."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, FAILURE, Job, state_of
from cl_merge.data.sampling import SIDE_BY_SIDE
from cl_merge.errors import InputError
from cl_merge.kernels.parallel import usable_cores
from cl_merge.storage.files import atomic_write

LOG = "log.txt"
"""What a job says, in its folder."""

_INTERRUPTED = (130, 143)  # exit codes after Ctrl-C and after SIGTERM
_LAST_WORDS = 4000  # bytes of a log in which the reason of a failure is looked for
_DAY = 24 * 60  # minutes


@dataclass(frozen=True)
class Ended:
    """A job that has ended: `DONE`, `FAILED`, or `BEGUN` if it was interrupted."""

    job: Job
    state: str
    seconds: float  # how long it ran this time
    reason: str = ""  # what it said last if it failed, or that it was interrupted


@dataclass
class Processes:
    """The commands that are running at the moment, so that they can be stopped together."""

    command: Sequence[str] = field(default_factory=lambda: (sys.executable, "-m", "cl_merge.cli"))
    patience: float = 20.0  # seconds that a command has to end by itself
    stopped: bool = False
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def call(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """Run the command with some words to its end, and give its exit code."""
        # Alone in a job of SLURM it starts the processes of its devices itself, which Lightning
        # leaves to SLURM unless the job has this name.
        alone = os.environ.get("SLURM_NTASKS") == "1"
        name = {"SLURM_JOB_NAME": "interactive"} if alone else {}
        with log.open("ab") as output:
            output.write(f"cl-merge {' '.join(words)}\n".encode())
            output.flush()
            with subprocess.Popen(  # noqa: S603 - our own command
                [*self.command, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Out of the terminal's reach: Ctrl-C comes from here, once.
                process_group=0,
                env={**os.environ, **name, **environment, "COLUMNS": "100"},
            ) as process:
                self._running.add(process)
                if self.stopped:  # meanwhile
                    process.terminate()
                try:
                    return process.wait()
                finally:
                    self._running.discard(process)

    def stop(self) -> None:
        """Ask them to end; those that do not are killed, which their runs survive."""
        self.stopped = True
        left, end = list(self._running), time.monotonic() + self.patience
        for process in left:
            process.terminate()
        for process in left:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()


def run_here(
    jobs: Sequence[Job],
    folder: Path,
    parallel: int | None = None,
    processes: Processes | None = None,
) -> Iterator[Ended]:
    """Run jobs as processes of this machine, and yield each as it ends, failed or not.

    As many as `parallel` run at a time, by default one for each GPU; they share out the cores.
    """
    gpus = _visible_gpus()
    number = parallel if parallel is not None else max(len(gpus), 1)
    if number < 1:
        raise InputError(f"parallel {number}; expected 1 or more")
    running = processes or Processes()
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for slot in range(number):
        slots.put(_environment(slot, number, gpus))

    def run(job: Job) -> Ended:
        environment = slots.get()
        try:
            return run_job(job, folder, environment, running)
        finally:
            slots.put(environment)

    pool = ThreadPoolExecutor(number)
    try:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        running.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_on_cluster(
    jobs: Sequence[Job], folder: Path, options: Mapping[str, Any]
) -> Iterator[Ended]:
    """Run jobs through submitit, from a folder that all machines see, and yield each as it ends.

    The options are ``cluster`` and any parameter of ``submitit.AutoExecutor.update_parameters``.
    """
    executor = _executor(folder, options)
    from submitit import helpers

    with executor.batch():
        # The machines need not start where this process did.
        sent = [executor.submit(run_job, job, folder.resolve()) for job in jobs]
    left = dict(zip(sent, jobs, strict=True))
    try:
        for handle in helpers.as_completed(sent, poll_frequency=1.0):
            job = left.pop(handle)
            try:
                ended = handle.result()
            # The machine may be gone, or the time over: what there is to know is in the message.
            except Exception as error:
                said = str(error).strip().splitlines() or [type(error).__name__]
                ended = _failed(job, folder, said[-1], 0.0)
            yield ended
    finally:
        for handle in left:
            handle.cancel()


def run_job(
    job: Job,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    processes: Processes | None = None,
) -> Ended:
    """Run one job as a process of its own, whatever happens to it."""
    run_folder = folder / job.path
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / FAILURE).unlink(missing_ok=True)
    with atomic_write(run_folder / "job.yaml") as temporary:
        OmegaConf.save(OmegaConf.create(dict(job.config)), temporary)
    running = processes or Processes()
    words = ["run", "--config", str(run_folder / "job.yaml"), f"out={run_folder}"]
    began = time.monotonic()
    code = running.call(words, run_folder / LOG, environment or {})
    seconds = time.monotonic() - began
    if code == 0 and state_of(job, folder) == DONE:
        return Ended(job, DONE, seconds)
    if code in _INTERRUPTED or running.stopped:
        return Ended(job, BEGUN, seconds, "interrupted")
    return _failed(job, folder, _reason(run_folder / LOG, code), seconds)


def _failed(job: Job, folder: Path, reason: str, seconds: float) -> Ended:
    """Note in the folder of a job that it failed, and why."""
    with atomic_write(folder / job.path / FAILURE) as temporary:
        failure = {"reason": reason, "seconds": round(seconds, 1)}
        temporary.write_text(json.dumps(failure, indent=2) + "\n", encoding="utf-8")
    return Ended(job, FAILED, seconds, reason)


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip() and gpu.strip() != "-1"]
    return [str(number) for number in range(torch.cuda.device_count())]


def _environment(slot: int, slots: int, gpus: list[str]) -> dict[str, str]:
    found = {SIDE_BY_SIDE: str(slots)}
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(usable_cores() // slots, 1))
    # One job alone keeps all GPUs: it may train on several.
    if gpus and slots > 1:
        found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return found


def _reason(log: Path, code: int) -> str:
    """The last thing a process said, or what ended it."""
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    text = "\n" + log.read_bytes()[-_LAST_WORDS:].decode(errors="replace")
    # Behind the words of its command: before them stands what an earlier try said.
    lines = text.rpartition("\ncl-merge run ")[2].splitlines()[1:]
    said = [line.strip() for line in lines if line.strip()]
    ours = [line for line in said if line.startswith("cl-merge: ")]
    last = (ours or said or [""])[-1]
    return last.removeprefix("cl-merge: ") or f"exit code {code}"


def _executor(folder: Path, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError(
            'several machines need the package submitit: pip install "cl-merge[cluster]"'
        ) from error
    settings = {"timeout_min": _DAY, **options}
    try:
        executor = submitit.AutoExecutor(
            folder=folder / "cluster" / "%j", cluster=settings.pop("cluster", None)
        )
        executor.update_parameters(name=f"cl-merge-{folder.name}", **settings)
    # What submitit raises for a cluster or a parameter that does not exist depends on its version.
    except Exception as error:
        raise InputError(f"cluster: {' '.join(str(error).split())}") from error
    return executor
