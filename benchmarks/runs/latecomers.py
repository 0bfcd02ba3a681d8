"""Methods that join a run when some of its tasks are learned: they merge what it has stored."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from cl_merge.benchmarks.methods.method import Method, Training
from cl_merge.benchmarks.runs.evaluation import fill_row
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run, make_merger
from cl_merge.benchmarks.runs.statistics import learn_task
from cl_merge.callbacks import ClassStatistics
from cl_merge.data.task_stream import TaskStream
from cl_merge.storage.files import load_tensors
from cl_merge.task_vectors.module_weights import swapped, trained_parameters
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.task_vector import TaskVector


def evaluate_latecomers(
    run: Run,
    stream: TaskStream,
    training: Training,
    methods: list[Method],
    statistics: Mapping[str, ClassStatistics],
    progress: RunProgress,
) -> None:
    """Fill the rows of tasks that will not be learned again.

    Methods that do not merge get the weights that the task vector leads to, which differ from those
    that were trained by rounding. A scale that was chosen after each task is not chosen again.

    Args:
        run: The run, with the matrices begun.
        stream: Its tasks.
        training: Which training.
        methods: Those that share it.
        statistics: Their class statistics, by name.
        progress: Shows how far the run is.
    """
    finished = run.folder.finished_tasks(training.name, len(stream.tasks))
    wanted = set(finished) & set(run.rows(training.name))

    def is_late(method: Method) -> bool:
        behind = method.name in statistics and statistics[method.name].tasks < len(finished)
        return behind or bool(wanted - set(run.matrices[method.name].rows))

    late = [method for method in methods if is_late(method)]
    mergers = {
        method.plain.name: make_merger(run.config, method)[0] for method in late if method.merger
    }
    chosen = {method.name: run.folder.chosen_scales(method.plain.name) for method in late}
    for task in finished if late else ():
        folder = run.folder.task_vectors(training.name)
        vector = _placed(run, TaskVector.load(folder / f"task{task}.safetensors"))
        for each in mergers.values():
            importance = None
            if each.weighted:
                stored, _ = load_tensors(folder / f"importance{task}.safetensors")
                importance = _placed(run, stored)
            each.update(vector, importance)
        stream.select(task)
        for method in late:
            progress.describe(
                f"task {task + 1}/{len(stream.tasks)}, {method.name}", method.encoders
            )
            merger, voting = mergers.get(method.plain.name), statistics.get(method.name)
            if chosen[method.name]:
                scales = [Scales.read(scale, 0.0) for scale in chosen[method.name]]
                run.chosen[method.plain.name], run.scales[method.name] = scales, scales[task]
            if voting is not None:
                learn_task(run, stream, method.name, voting, merger)
            if task in wanted:
                with nullcontext() if merger else _trained(run, vector):
                    fill_row(run, stream, method.name, progress, merger, voting)


def _placed(run: Run, tensors: Mapping[str, Tensor]) -> TaskVector:
    device = next(iter(run.base.values())).device
    return TaskVector({name: tensor.to(device) for name, tensor in tensors.items()})


def _trained(run: Run, vector: TaskVector) -> AbstractContextManager[None]:
    weights = ((name, run.base[name] + tensor) for name, tensor in vector.items())
    return swapped(trained_parameters(run.model), weights)
