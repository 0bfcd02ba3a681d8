"""What the mergers that elect a sign for each element share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError
from cl_merge.kernels import count_signs, elect, fold_signed
from cl_merge.mergers.base import Accumulators, Merger
from cl_merge.mergers.chunks import End

_COUNT = torch.int16
_MOST_TASKS = torch.iinfo(_COUNT).max


class SignElection(Merger):
    """Elect a sign per element, that of the sum over tasks, and average the values that have it.

    Elements whose sum is zero although they have values take the sign of the majority, that of the
    sum of all signs. A subclass decides which values of a task vector stand for election.

    Reference:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023,
        algorithm 1, steps 2 and 3.
    """

    accumulators: ClassVar = {
        "positive_sum": torch.float32,
        "negative_sum": torch.float32,
        "positive_count": _COUNT,
        "negative_count": _COUNT,
    }

    def stand(
        self,
        kept: Accumulators,
        values: Tensor | tuple[Tensor, Tensor],
        task: int,
        threshold: float = 0.0,
    ) -> bool | None:
        """Let the values of a task vector stand for election, but zeros.

        Args:
            kept: A stretch of the accumulators, each [n].
            values: float32 [n]; or fine-tuned weights and base, whose difference is meant.
            task: Index of the task.
            threshold: Magnitude that a value must reach.

        Returns:
            Whether all values are finite, where weights and base were given, else True; None if
            weights and base were given and nothing was done.
        """
        if task >= _MOST_TASKS:
            raise InputError(
                f"'{self.name}' counts up to {_MOST_TASKS} tasks; merge them in groups"
            )
        sums, counts = _by_sign(kept)
        done = fold_signed(sums, counts, values, threshold)
        if done is not None or not isinstance(values, Tensor):
            return done
        stands = torch.where(values.abs() >= threshold, values, 0)
        counts[0].add_(stands > 0)
        counts[1].add_(stands < 0)
        sums[0].add_(stands.clamp(min=0))
        sums[1].add_(stands.clamp_(max=0))
        return True

    @override
    def tally(self, kept: Accumulators) -> tuple[int, bool]:
        sums, counts = _by_sign(kept)
        counted = count_signs(sums, counts[0])
        if counted is not None:
            return counted
        total = sums[0] + sums[1]
        balance = int((total > 0).count_nonzero()) - int((total < 0).count_nonzero())
        return balance, bool(((total == 0) & (counts[0] > 0)).any())

    @override
    def finish(self, kept: Accumulators, out: Tensor, end: End) -> None:
        sums, counts = _by_sign(kept)
        majority = (end.tally > 0) - (end.tally < 0)
        if elect(sums, counts, out, majority):
            return
        total = sums[0] + sums[1]
        elected = torch.where(total == 0, majority, total)
        positive = elected > 0
        count = torch.where(positive, *counts)
        torch.where(positive, *sums, out=out)
        out.div_(count.clamp_(min=1))
        out.masked_fill_(elected == 0, 0)


def _by_sign(kept: Accumulators) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The sums and the counts, of the positive and of the negative values."""
    return (
        (kept["positive_sum"], kept["negative_sum"]),
        (kept["positive_count"], kept["negative_count"]),
    )
