"""The evaluation of one method of a run: a row of its accuracy matrix."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import lightning as L

from cl_merge.benchmarks.progress import RunProgress
from cl_merge.benchmarks.run import Run
from cl_merge.benchmarks.trainers import evaluation_trainer
from cl_merge.callbacks import MergeCallback
from cl_merge.mergers import Merger
from cl_merge.scales import scaled
from cl_merge.stream import TaskStream
from cl_merge.weights import swapped, trained_parameters


def fill_row(
    run: Run,
    stream: TaskStream,
    name: str,
    progress: RunProgress,
    merging: MergeCallback | Merger | None = None,
) -> None:
    """Fill a row of a method's matrix, unless it has it: of the live weights, or of merged ones.

    Args:
        run: The run.
        stream: Its tasks, at the one that was learned last.
        name: The method.
        progress: Shows how far the run is.
        merging: What merges; None for the weights as they are.
    """
    matrix, row = run.matrices[name], stream.row
    if row in matrix.rows:
        return
    run.model.accuracy = matrix
    live = trained_parameters(run.model)
    callbacks: list[L.Callback] = [progress]
    weights: AbstractContextManager[None] = nullcontext()
    if isinstance(merging, MergeCallback):
        callbacks = [merging, progress]
    elif merging is not None:
        weights = swapped(live, scaled(run.base, merging.items(), run.scales[name]))
    with weights:
        evaluation_trainer(run.config.trainer, callbacks).test(
            run.model, datamodule=stream, verbose=False
        )
    run.folder.add_row(name, row, matrix.rows[row])
