"""The scales that are not given but chosen after each task, by their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from torch import Tensor

from cl_merge.callbacks.auto_scale import AutoScale, Loader
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.stream_merger import StreamMerger
from cl_merge.task_vectors.scales import Scales


def as_choice(scale: Any, groups: Any = None) -> AutoScale | DriftScale | None:
    """What chooses the scale; None if it is given. The groups are those of ``"auto"``."""
    if isinstance(scale, str) and scale == "auto":
        return AutoScale(groups)
    if isinstance(scale, str) and scale == "drift":
        return DriftScale()
    return scale if isinstance(scale, AutoScale | DriftScale) else None


def choose_scale(
    choice: AutoScale | DriftScale,
    stream: StreamMerger,
    trainer: L.Trainer,
    module: L.LightningModule,
    held_out: Loader | None,
) -> Scales:
    """The scale of what a stream has merged so far."""
    changes, live = dict(stream.model.changes()), stream.model.written(module)

    def values(scales: Scales) -> Iterable[tuple[str, Tensor]]:
        return stream.model.values(live, scales, changes.items())

    batches, published = choice.batches(trainer, module, held_out), stream.merger.published_scale
    return choice.choose(trainer, module, batches, list(changes), values, published, live)
