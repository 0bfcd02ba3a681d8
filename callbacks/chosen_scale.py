"""The scale of a stream: given, or chosen after each task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from cl_merge.callbacks.auto_scale import AutoScale, Loader
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.errors import InputError, task_name
from cl_merge.stream_merger import StreamMerger
from cl_merge.task_vectors.scales import Scales

log = logging.getLogger(__name__)


def as_choice(scale: Any, groups: Any = None) -> AutoScale | DriftScale | None:
    """What chooses the scale; None if it is given. The groups are those of ``"auto"``."""
    if isinstance(scale, str) and scale == "auto":
        return AutoScale(groups)
    if isinstance(scale, str) and scale == "drift":
        return DriftScale()
    return scale if isinstance(scale, AutoScale | DriftScale) else None


class ChosenScale:
    """Chooses the scale of a stream after each task, unless it is given.

    Args:
        scale: As of `MergeCallback`.
        held_out: As of `MergeCallback`.
        published: The scale that the method was published with.

    Attributes:
        given: The scale that is given, or that is there before one is chosen.
        chosen: The scales that were chosen, one for each task.
        chooses: Whether the scale is chosen.

    Raises:
        InputError: If the scale is wrong, or no held-out images are needed.
    """

    def __init__(self, scale: Any, held_out: Loader | None, published: float) -> None:
        self._choice, self._held_out = as_choice(scale), held_out
        self.chooses = self._choice is not None
        self.given = Scales.read(None if self.chooses else scale, published)
        if held_out is not None and not isinstance(self._choice, AutoScale):
            raise InputError(f"held_out is for scale='auto', but the scale is {self.given.plain()}")
        self.chosen: list[Scales] = []
        self._known: list[Scales] = []  # what was chosen before a state was loaded

    def check(self, names: Iterable[str]) -> None:
        """Make sure that the choice fits names of parameters, or raise `InputError`."""
        if self._choice is not None:
            self._choice.check(names)

    def prepare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise `InputError` before the training if no scale could be chosen after it."""
        if self._choice is not None:
            self._choice.prepare(trainer, module, self._held_out)

    def try_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Try a task's first batch: what fails shows before the task trains."""
        if isinstance(self._choice, DriftScale):
            self._choice.try_batch(trainer, module, batch)

    def choose(self, stream: StreamMerger, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Choose the scale of what a stream has merged so far, and set it."""
        if self._choice is None:
            return
        changes, live = dict(stream.model.changes()), stream.model.written(module)

        def values(scales: Scales) -> Iterable[tuple[str, Tensor]]:
            return stream.model.values(live, scales, changes.items())

        batches = self._choice.batches(trainer, module, self._held_out)
        published = stream.merger.published_scale
        found = self._choice.choose(
            trainer, module, batches, list(changes), values, published, live
        )
        self._set(found, stream)

    def recall(self, stream: StreamMerger) -> None:
        """Set what was chosen for a stream's last task, which a checkpoint of within it lacks."""
        if self.chooses and len(self._known) >= stream.tasks:
            self._set(self._known[stream.tasks - 1], stream)
        elif self.chooses:
            message = "the scale of %s has not been chosen yet; the checkpoint is evaluated at %s"
            log.warning(message, task_name(stream.tasks - 1), stream.scales)

    def load(self, chosen: Sequence[Any], stream: StreamMerger) -> None:
        """Go on from scales that were chosen, as plain values, and set the last one."""
        self._known, self.chosen = self.chosen, [Scales.read(scale, 0.0) for scale in chosen]
        if self.chooses and self.chosen:
            stream.scales = self.chosen[-1]

    def _set(self, scales: Scales, stream: StreamMerger) -> None:
        stream.scales = scales
        self.chosen.append(scales)
