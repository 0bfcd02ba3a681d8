"""Suites whose runs are written down instead of run."""

import pytest
from results_files import write_results_file

from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.benchmarks.suites.plan import jobs_of, make_plan


@pytest.fixture
def write_results(tmp_path):
    """A function that writes results of a job: accuracies by method."""

    def write(job, accuracies, seconds=60.0, tasks=2, folder=tmp_path):
        place = folder / job.path
        place.mkdir(parents=True, exist_ok=True)
        methods = {
            name: {
                "accuracy": value,
                "metrics": {"accuracy": value, "forgetting": None if tasks == 1 else 3.0},
                "matrix": [[value] * tasks],
                "merger": None if name in ("zero-shot", "joint", "lwf") else "magmax",
                "training": job.training,
            }
            for name, value in accuracies.items()
        }
        results = {
            "methods": methods,
            "tasks": [
                {"name": f"part {i}", "train_images": 100, "test_images": 50} for i in range(tasks)
            ],
            "total": {"seconds": seconds, "peak_memory": 2**30, "peak_device_memory": 0},
        }
        (place / "journal.jsonl").touch()
        write_results_file(place, results)
        return place

    return write


@pytest.fixture
def two_seeds():
    """A part of the offline suite with two seeds, and its jobs by training and seed."""
    suite = narrowed(
        find_suite("offline"),
        data=["digits"],
        methods=["zero-shot", "joint", "magmax", "average-sequential", "ties"],
        seeds="2",
    )
    return suite, {(job.training, job.seed): job for job in jobs_of(make_plan(suite))}
