"""Model Stock: the mean, as near to the base as the angles between the task vectors say."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, ResultInfo
from cl_merge.mergers.matrices import on_one_thread


class ModelStock(Merger):
    """Take the mean over tasks times t = k cos θ / (1 + (k - 1) cos θ), each parameter by itself.

    θ is the angle between the task vectors of a parameter, each taken as one long vector. The
    weights of fine-tuned models scatter around a centre, to which this is the nearest point between
    their mean, t = 1 where all changes are the same, and the base, t = 0 where they are at right
    angles.

    The paper derives t for vectors that all have one angle. Where they have not, cos θ is the mean
    over all pairs, as in mergekit; it follows from the length of the sum of the directions, so that
    no task vector is kept. A task that did not change a parameter is at right angles to the others.
    Where the mean cosine is negative t is 0: the formula would point away from all of them.

    Example:
        >>> merger = ModelStock()
        >>> merger.update({"weight": torch.tensor([2.0, 0.0])})
        >>> merger.update({"weight": torch.tensor([1.2, 1.6])})
        >>> merger.merged()["weight"]
        tensor([1.2000, 0.6000])

    Reference:
        Jang, Yun & Han, Model Stock: All We Need Is Just a Few Fine-Tuned Models, ECCV 2024,
        section 4; the scale is within the method: t.
    """

    name = "model-stock"
    published_scale = 1.0
    unit = "parameter"
    accumulators: ClassVar = {
        "sum": torch.float32,
        "directions": torch.float32,  # the sum of the task vectors of length 1
        "changes": torch.int32,  # how many tasks changed the parameter, the same everywhere
    }

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        state["sum"].add_(chunk)
        with on_one_thread():
            vector = chunk.double()
            length = vector.square().sum().sqrt()
            if length > 0:
                state["directions"].add_(vector / length)
                state["changes"].add_(1)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        if info.tasks == 1:
            out.copy_(state["sum"])
            return
        with on_one_thread():
            square = float(state["directions"].double().square().sum())
        # |Σ u|² of directions u is their number and twice the sum of the cosines of all pairs.
        cosine = (square - int(state["changes"][0])) / (info.tasks * (info.tasks - 1))
        ratio = info.tasks * cosine / (1 + (info.tasks - 1) * cosine) if cosine > 0 else 0.0
        out.copy_(state["sum"].double() * (ratio / info.tasks))
