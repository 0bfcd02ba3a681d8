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
    """Fill the rows of tasks that others of the same training have been evaluated after already.

    Methods that do not merge get the weights that the task vector leads to, which differ from those
    that were trained by rounding.

    Args:
        run: The run, with the matrices begun.
        stream: Its tasks.
        training: Which training.
        methods: Those that share it.
        progress: Shows how far the run is.
    """
    done = set().union(*(run.matrices[method.name].rows for method in methods))
    late = [method for method in methods if done - set(run.matrices[method.name].rows)]
    mergers = {method.name: make_merger(run.config, method)[0] for method in late if method.merger}
    for task in stream.tasks if late else ():
        if task.index > max(done):
            break
        vector = _stored(run, training, task.index)
        for merger in mergers.values():
            merger.update(vector)
        stream.select(task.index)
        for method in late if task.index in done else ():
            progress.describe(f"task {task.index + 1}/{len(stream.tasks)}, {method.name}")
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
