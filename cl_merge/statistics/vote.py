"""How much the text head and the statistics count, chosen on the current task's images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A point each half octave; beyond these ends one of the two decides alone.
_WEIGHTS = tuple(2.0 ** (exponent / 2) for exponent in range(-10, 9))
_TEMPERATURES = tuple(2.0 ** (exponent / 2) for exponent in range(-10, 7))
# Losses are summed as whole multiples of this, so that any order gives the same bits.
_STEP = 2.0**-24


@dataclass(frozen=True)
class Vote:
    """What the text head's logits and the scores of the statistics are multiplied by.

    Attributes:
        text: Factor of the logits; 0 leaves the classes that were seen to the statistics.
        statistics: Factor of the scores.
    """

    text: float = 1.0
    statistics: float = 1.0

    def combine(self, text: Tensor, scores: Tensor) -> Tensor:
        """Combine the text head's logits with the scores of the statistics.

        The statistics say nothing of classes that they have not seen. Those keep the probability
        that the text head gives them; only the rest is dealt out anew among the others.

        Args:
            text: Logits, float [B, K].
            scores: Float [B, K]; minus infinity for classes not seen.

        Returns:
            Log-probabilities, float [B, K].

        Example:
            >>> text, scores = torch.zeros(1, 3), torch.tensor([[9.0, 0.0, -torch.inf]])
            >>> Vote().combine(text, scores).exp().round(decimals=2)
            tensor([[0.6700, 0.0000, 0.3300]])
        """
        seen = scores > -torch.inf
        prior = text.log_softmax(dim=1)
        share = prior.masked_fill(~seen, -torch.inf).logsumexp(dim=1, keepdim=True)
        mixed = self.text * text + self.statistics * scores.masked_fill(~seen, 0.0)
        within = mixed.masked_fill(~seen, -torch.inf)
        within = within - within.logsumexp(dim=1, keepdim=True)
        return torch.where(seen, share + within, prior)


def choose_vote(
    text: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Vote:
    """Choose both factors by the cross entropy on images, over the classes seen.

    Their ratio decides what is predicted. They are chosen apart because the scores of a
    discriminant are far too sure of themselves: with the text's factor fixed, the best factor of
    the scores would be the one that dampens them.

    Args:
        text: Logits of the text head, float [B, C].
        scores: Of the statistics without the image itself (`left_out_scores`), float [B, C], minus
            infinity for classes not seen.
        labels: Classes of the images, int64 [B].
        total: Sums an int64 tensor over all processes.

    Returns:
        The vote; the default one if there is no image.
    """
    seen = (scores > -torch.inf).any(dim=0)
    losses = torch.zeros(len(_WEIGHTS), len(_TEMPERATURES), dtype=torch.int64)
    text, scores = text.double()[:, seen], scores.double()[:, seen]
    places = (seen.long().cumsum(0) - 1)[labels] if len(scores) else labels
    if len(scores):
        for row, weight in enumerate(_WEIGHTS):
            mixed = text + weight * scores
            for column, temperature in enumerate(_TEMPERATURES):
                # More is as wrong as can be, and would not fit the whole numbers.
                loss = -(temperature * mixed).log_softmax(dim=1).gather(1, places[:, None])
                losses[row, column] = (loss.clamp(max=2.0**10) / _STEP).round().long().sum()
    losses = total(losses).cpu()
    if not int(losses.abs().max()):
        return Vote()
    best = int(losses.flatten().argmin())
    row, column = divmod(best, len(_TEMPERATURES))
    return Vote(_TEMPERATURES[column], _TEMPERATURES[column] * _WEIGHTS[row])
