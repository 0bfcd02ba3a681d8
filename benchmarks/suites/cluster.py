"""Run the jobs of a suite on many machines, through submitit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.suites.execution import Ended, failed, run_job
from cl_merge.benchmarks.suites.plan import Job
from cl_merge.errors import InputError

_DAY = 24 * 60  # minutes


def run_on_cluster(
    jobs: Sequence[Job], folder: Path, options: Mapping[str, Any]
) -> Iterator[Ended]:
    """Run jobs through submitit, from a folder that all machines see, and yield each as it ends.

    The options are ``cluster`` and any parameter of ``submitit.AutoExecutor.update_parameters``.
    """
    executor = _executor(folder, options)
    from submitit.helpers import as_completed

    with executor.batch():
        # The machines need not start where this process did.
        sent = [executor.submit(run_job, job, folder.resolve()) for job in jobs]
    left = dict(zip(sent, jobs, strict=True))
    try:
        for handle in as_completed(sent, poll_frequency=1.0):
            yield _ended_there(handle, left.pop(handle), folder)
    finally:
        for handle in left:
            handle.cancel()


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


def _ended_there(handle: Any, job: Job, folder: Path) -> Ended:
    try:
        ended: Ended = handle.result()
        return ended
    # The machine may be gone, or the time over: what there is to know is in the message.
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return failed(job, folder, reason, 0.0)
