"""Slerp: along the arc between two task vectors."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.mergers.base import ResultInfo
from cl_merge.mergers.matrices import on_one_thread
from cl_merge.mergers.options import checked_number
from cl_merge.mergers.stack import StackMerger

_PARALLEL = 0.9995
"""Cosine from which two vectors count as parallel, as in mergekit."""


class Slerp(StackMerger):
    """Interpolate between two task vectors along an arc, each parameter by itself.

    With the angle w between both vectors a and b of a parameter, taken as one long vector each:
    sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b. Where the straight mean of two vectors that
    disagree is shorter than both, this is not. Vectors that are nearly parallel or opposite,
    abs(cos(w)) > 0.9995, and vectors of zeros are interpolated in a straight line.

    The rule is mergekit's, but mergekit applies it to the weights themselves, as merging files
    without a base does; weights of fine-tuned models are nearly parallel, their changes are not.
    One task vector alone stays as it is; more than two have no one way around the sphere and are
    refused.

    Args:
        t: Where on the arc: 0 gives the first task vector, 1 the second.

    Example:
        >>> merger = Slerp(t=0.5)
        >>> merger.update({"weight": torch.tensor([2.0, 0.0])})
        >>> merger.update({"weight": torch.tensor([0.0, 2.0])})
        >>> merger.merged()["weight"]
        tensor([1.4142, 1.4142])

    Reference:
        Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985, section 3.3; for
        weights: mergekit, merge method "slerp", which has no default for t and no scale.
    """

    name = "slerp"
    published_scale = 1.0
    needs_base = False
    unit = "parameter"

    def __init__(self, *, t: float = 0.5) -> None:
        super().__init__()
        self.t = checked_number("t", t, 0, 1)

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        if len(values) == 1:
            return values[0]
        if len(values) > 2:
            raise InputError(
                f"'slerp' merges two task vectors, not {len(values)}; take another method, "
                "or merge two"
            )
        first, second = values.double()
        with on_one_thread():
            lengths = _length(first) * _length(second)
            cosine = float((first * second).sum()) / lengths if lengths > 0 else 1.0
        one, other = 1 - self.t, self.t
        if abs(cosine) <= _PARALLEL:
            angle = math.acos(cosine)
            one, other = (math.sin(part * angle) / math.sin(angle) for part in (one, other))
        merged: Tensor = one * first + other * second
        return merged


def _length(vector: Tensor) -> float:
    return math.sqrt(float(vector.square().sum()))
