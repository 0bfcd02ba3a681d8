"""The evaluation of one method of a run: a row of its accuracy matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L

from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run
from cl_merge.benchmarks.runs.trainers import evaluation_trainer
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.data.task_stream import TaskStream
from cl_merge.mergers import Merger
from cl_merge.task_vectors.module_weights import floating_buffers, swapped, trained_parameters
from cl_merge.task_vectors.scales import scaled


def fill_row(
    run: Run,
    stream: TaskStream,
    name: str,
    progress: RunProgress,
    merging: MergeCallback | Merger | None = None,
    statistics: ClassStatistics | None = None,
) -> None:
    """Fill a row of a method's matrix, unless it has it: of the live weights, or of others.

    Args:
        run: The run.
        stream: Its tasks, at the one that was learned last.
        name: The method.
        progress: Shows how far the run is.
        merging: As of `weights_of`.
        statistics: What votes with the text head; None for the text head alone.
    """
    matrix, row = run.matrices[name], stream.row
    if row in matrix.rows:
        return
    run.model.accuracy = matrix
    voting = [statistics] if statistics is not None else []
    with weights_of(run, name, merging, statistics) as callbacks:
        evaluation_trainer(run.config.trainer, [*callbacks, *voting, progress]).test(
            run.model, datamodule=stream, verbose=False
        )
    run.folder.add_row(name, row, matrix.rows[row])


@contextmanager
def weights_of(
    run: Run,
    name: str,
    merging: MergeCallback | Merger | None,
    statistics: ClassStatistics | None = None,
) -> Iterator[list[L.Callback]]:
    """Hold the weights that a method classifies with in the model for a while.

    Args:
        run: The run.
        name: The method.
        merging: What merges; None for the pre-trained weights under statistics, and for the weights
            as they are without.
        statistics: Its class statistics, if it has any.

    Yields:
        The callbacks that a trainer needs to do so, where they do it.
    """
    if isinstance(merging, MergeCallback):
        yield [merging]
    elif merging is not None:
        with swapped(
            trained_parameters(run.model), scaled(run.base, merging.items(), run.scales[name])
        ):
            yield []
    elif statistics is not None:
        live = trained_parameters(run.model) | floating_buffers(run.model)
        with swapped(live, run.base | run.buffers):
            yield []
    else:
        yield []
