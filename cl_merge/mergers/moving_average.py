"""Exponential moving average of the models over time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger
from cl_merge.mergers.options import checked_number


class MovingAverage(Merger):
    """Average the models over time, with weights that fall exponentially into the past.

    After the first task the average is that task's model; after each later one it is `decay` times
    the former average plus 1 - decay times the new model.

    Args:
        decay: Share of the former average, 0 (the last model) to 1 (the first).

    Example:
        >>> merger = MovingAverage(decay=0.75)
        >>> merger.update({"weight": torch.tensor([4.0])})
        >>> merger.update({"weight": torch.tensor([8.0])})
        >>> merger.merged()["weight"]
        tensor([5.])

    Reference:
        Stojanovski, Roth & Akata, Momentum-based Weight Interpolation of Strong Zero-Shot Models
        for Continual Learning, 2022, where the average is taken during training and starts at the
        pre-trained weights. The default of `decay` is no published figure.
    """

    name = "ema"
    published_scale = 1.0
    accumulators: ClassVar = {"merged": torch.float32}

    def __init__(self, *, decay: float = 0.5) -> None:
        super().__init__()
        self.decay = checked_number("decay", decay, 0, 1)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        if info.task == 0:
            state["merged"].copy_(chunk)
        else:
            state["merged"].mul_(self.decay).add_(chunk * (1 - self.decay))
