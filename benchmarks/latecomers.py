"""Methods that join a run when some of its tasks are learned: they merge what it has stored."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from cl_merge.benchmarks.evaluation import fill_row
from cl_merge.benchmarks.methods import Method, Training
from cl_merge.benchmarks.progress import RunProgress
from cl_merge.benchmarks.run import Run, make_merger
from cl_merge.stream import TaskStream
from cl_merge.task_vector import TaskVector
from cl_merge.weights import swapped, trained_parameters


def evaluate_latecomers(
    run: Run, stream: TaskStream, training: Training, methods: list[Method], progress: RunProgress
) -> None:
    """Fill the rows of tasks that will not be learned again.

    Methods that do not merge get the weights that the task vector leads to, which differ from those
    that were trained by rounding.

    Args:
        run: The run, with the matrices begun.
        stream: Its tasks.
        training: Which training.
        methods: Those that share it.
        progress: Shows how far the run is.
    """
    finished = run.folder.finished_tasks(training.name, len(stream.tasks))
    wanted = set(finished) & set(run.rows(training.name))
    late = [method for method in methods if wanted - set(run.matrices[method.name].rows)]
    mergers = {method.name: make_merger(run.config, method)[0] for method in late if method.merger}
    for task in finished if late else ():
        vector = _stored(run, training, task)
        for each in mergers.values():
            each.update(vector)
        stream.select(task)
        for method in late if task in wanted else ():
            progress.describe(f"task {task + 1}/{len(stream.tasks)}, {method.name}")
            merger = mergers.get(method.name)
            with nullcontext() if merger else _trained(run, vector):
                fill_row(run, stream, method.name, progress, merger)


def _stored(run: Run, training: Training, task: int) -> TaskVector:
    vector = TaskVector.load(run.folder.task_vectors(training.name) / f"task{task}.safetensors")
    device = next(iter(run.base.values())).device
    return TaskVector({name: tensor.to(device) for name, tensor in vector.items()})


def _trained(run: Run, vector: TaskVector) -> AbstractContextManager[None]:
    weights = ((name, run.base[name] + tensor) for name, tensor in vector.items())
    return swapped(trained_parameters(run.model), weights)
