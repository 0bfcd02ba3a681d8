"""MagMax and MaxAbs: the value of largest magnitude."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.kernels import fold_largest
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger


class MaxMagnitude(Merger):
    """Keep, per element, the value of largest magnitude; on equality the later task's.

    The paper calls it MagMax on the task vectors of sequential fine-tuning, and MaxAbs on those of
    independent fine-tunings.

    Example:
        >>> merger = MaxMagnitude()
        >>> merger.update({"weight": torch.tensor([3.0, -1.0, 2.0])})
        >>> merger.update({"weight": torch.tensor([1.0, -4.0, -2.0])})
        >>> merger.merged()["weight"]
        tensor([ 3., -4., -2.])

    Reference:
        Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, ECCV 2024,
        section 4; scale from the authors' code.
    """

    name = "magmax"
    published_scale = 0.5
    takes_differences = True
    accumulators: ClassVar = {"merged": torch.float32}

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        fold_largest(state["merged"], chunk)
