"""Karcher mean: the middle of all task vectors on a sphere."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import ResultInfo
from cl_merge.mergers.matrices import on_one_thread
from cl_merge.mergers.stack import StackMerger

_STEPS = 100
_NEAR = 1e-12
"""Length of a step with which the mean counts as found, and sine of no angle."""
_SAME = 1e-6
"""Distance of directions that count as one."""
_NO_DIRECTION = 1e-6
"""Length below which the straight mean vanishes."""


class Karcher(StackMerger):
    """Turn the mean of the directions until it is in their middle on the sphere, by parameter.

    Each task vector of a parameter, taken as one long vector, has a direction and a length. The
    Karcher mean is the direction whose squared angles to all others have the smallest sum; the
    result has the mean length. It is to any number of tasks what `slerp` with t = 0.5 is to two:
    where tasks disagree, their straight mean is shorter, and this is not. A task that did not
    change a parameter has no direction, and length 0.

    The search begins at the straight mean of the directions, or at the first task where that
    vanishes, and steps along the sphere by the mean of what leads to each of them; a direction
    opposite to the mean pulls nowhere. mergekit takes at most 10 steps, and applies the rule to the
    weights themselves, as merging files without a base does; weights of fine-tuned models are
    nearly parallel, their changes are not.

    Example:
        >>> merger = Karcher()
        >>> for value in ([2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]):
        ...     merger.update({"weight": torch.tensor(value)})
        >>> merger.merged()["weight"]
        tensor([1.1547, 1.1547, 1.1547])

    Reference:
        Karcher, Riemannian Center of Mass and Mollifier Smoothing, 1977; for weights: mergekit,
        merge method "karcher", which has no scale.
    """

    name = "karcher"
    published_scale = 1.0
    needs_base = False
    unit = "parameter"

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        if len(values) == 1:
            return values[0]
        with on_one_thread():
            vectors = values.view(len(values), -1).double()
            lengths = vectors.square().sum(dim=1).sqrt()
            changed = lengths > 0
            if not bool(changed.any()):
                return values[0]
            units = vectors[changed] / lengths[changed, None]
            # The mean lies in what the T directions span: it is searched there, with T coordinates
            # or fewer. Two directions that float32 cannot tell apart are one.
            squares, axes = torch.linalg.eigh(units @ units.T)
            told = squares > _SAME**2
            roots, axes = squares[told].sqrt(), axes[:, told]
            shares: Tensor = axes / roots @ _middle(axes * roots)
            return (lengths.mean() * (shares @ units)).view(values.shape[1:])


def _middle(directions: Tensor) -> Tensor:
    """Find the Karcher mean [R] of vectors of length 1, [T, R]."""
    mean: Tensor = directions.mean(dim=0)
    if _length(mean) < _NO_DIRECTION:
        mean = directions[0]
    mean = mean / _length(mean)
    for _ in range(_STEPS):
        towards = (directions @ mean).clamp(-1, 1)
        # The logarithm map: angle / sine, of what a direction has beside its part along the mean.
        sines = (1 - towards.square()).sqrt()
        none = sines < _NEAR
        pulls = torch.where(none, towards > 0, towards.acos() / sines.masked_fill(none, 1))
        step = (pulls @ directions - (pulls @ towards) * mean) / len(directions)
        size = _length(step)
        if size < _NEAR:
            break
        mean = size.cos() * mean + size.sin() / size * step
        mean = mean / _length(mean)
    return mean


def _length(vector: Tensor) -> Tensor:
    return vector.square().sum().sqrt()
