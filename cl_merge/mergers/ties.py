"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from cl_merge.mergers.base import Accumulators
from cl_merge.mergers.chunks import Place, Reader
from cl_merge.mergers.election import SignElection
from cl_merge.mergers.options import checked_share
from cl_merge.mergers.threshold import trim_threshold


class Ties(SignElection):
    """Trim each task vector, elect a sign per element, and average the values that agree with it.

    *Trim*: of each task vector only the values of largest magnitude stay, all those that reach its
    own k-th smallest magnitude over all parameters, k = d - floor(density * d).
    *Elect*: the sign of an element is that of the sum over tasks; elements whose sum is zero take
    the sign of the majority, that of the sum of all signs. *Merge*: the mean of the values of the
    elected sign; 0 where there is none.

    The density is that of what is given: the published runs trimmed whole CLIP models, in which the
    frozen text tower counts as zeros, so that their 20 % is 34.7 % of the image encoder.

    Args:
        density: Share of each task vector that stays, above 0 and up to 1.

    Example:
        >>> merger = Ties(density=0.2)
        >>> merger.update({"weight": torch.tensor([4.0, 3.0, 1.0, -0.2, 0.1])})
        >>> merger.update({"weight": torch.tensor([2.0, -5.0, 0.3, 0.1, 0.2])})
        >>> merger.merged()["weight"]
        tensor([ 3., -5.,  0.,  0.,  0.])

    Reference:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023,
        section 3 and algorithm 1; scale from Marczak et al., MagMax, ECCV 2024.
    """

    name = "ties"
    published_scale = 0.55

    def __init__(self, *, density: float = 0.2) -> None:
        super().__init__()
        self.density = checked_share("density", density)

    @override
    def survey(self, vector: Reader) -> float:
        return trim_threshold(vector, self.density)

    @override
    def fold(self, kept: Accumulators, chunk: Tensor, place: Place) -> None:
        self.stand(kept, chunk, place.task, place.survey)

    @override
    def fold_tuned(
        self, kept: Accumulators, tuned: Tensor, base: Tensor, place: Place
    ) -> bool | None:
        return self.stand(kept, (tuned, base), place.task, place.survey)
