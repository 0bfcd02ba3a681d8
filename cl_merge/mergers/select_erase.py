"""SCE: select what varies, weigh tasks by it, erase what has the minority's sign."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import ResultInfo
from cl_merge.mergers.matrices import on_one_thread
from cl_merge.mergers.options import checked_share
from cl_merge.mergers.stack import StackMerger


class SelectCalculateErase(StackMerger):
    """Merge what varies most between tasks, with weights that they earn by it.

    Each parameter by itself. *Select*: of the elements whose variance over tasks is not zero, the
    share `density` of largest variance stays, and with them those of the same variance.
    *Calculate*: the weight of a task is the sum of the squares of its values that stay. *Erase*:
    the sign of an element is that of the sum of the values that stay, and values of the other sign
    drop out. The result is the weighted mean of what is left.

    The rule is mergekit's, but where it counts a sum of zero as positive, here the element is zero.
    With all values, ``density=1``, nothing is selected, nor where there is one task.

    Args:
        density: Share of the elements to select, above 0 and at most 1. mergekit's default is 1.

    Example:
        >>> merger = SelectCalculateErase()
        >>> merger.update({"weight": torch.tensor([3.0, -1.0])})
        >>> merger.update({"weight": torch.tensor([1.0, 2.0])})
        >>> merger.merged()["weight"]
        tensor([2.3333, 2.0000])

    Reference:
        Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024, "SCE"; mergekit, merge method
        "sce". Neither has a scale.
    """

    name = "sce"
    published_scale = 1.0
    unit = "parameter"

    def __init__(self, *, density: float = 1.0) -> None:
        super().__init__()
        self.density = checked_share("density", density)

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        if len(values) == 1 or values.numel() == 0:
            return values[0]
        with on_one_thread():
            values = values.double()
            if self.density < 1:
                values = values * _selected(values, self.density)
            squares = torch.stack([vector.square().sum() for vector in values])
            # Where a task changed nothing its weight is 0; where none did, all values are.
            weights = squares.view(-1, *[1] * (values.dim() - 1))
            agree = (values.sign() == values.sum(dim=0).sign()) & (values != 0)
            total = (agree * weights).sum(dim=0)
            merged: Tensor = (agree * weights * values).sum(dim=0)
            return merged / total.masked_fill(total == 0, 1)


def _selected(values: Tensor, density: float) -> Tensor:
    """Which elements of [T, ...] are among those of largest variance over T."""
    variance = (values - values.mean(dim=0)).square().mean(dim=0)
    count = int(density * int(variance.count_nonzero()))
    if count == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    least = variance.flatten().kthvalue(variance.numel() - count + 1).values
    return variance >= least
