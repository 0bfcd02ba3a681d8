"""How much the text head and the statistics count, chosen on the images of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A point each half octave; beyond these ends one of the two decides alone.
_WEIGHTS = tuple(2.0 ** (exponent / 2) for exponent in range(-10, 9))
_TEMPERATURES = tuple(2.0 ** (exponent / 2) for exponent in range(-10, 7))
# Losses are summed as whole multiples of this, so that any order gives the same bits, and how many
# images are scored at once changes hardly any.
_STEP = 2.0**-12


@dataclass(frozen=True)
class Vote:
    """What the text head's logits and the scores of the statistics are multiplied by.

    Attributes:
        text: Factor of the logits; 0 leaves the classes that were seen to the statistics.
        statistics: Factor of the scores.
    """

    text: float = 1.0
    statistics: float = 1.0

    def combine(self, text: Tensor, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        """Combine the text head's logits with the scores of the statistics.

        Classes that the statistics have not seen keep the probability that the text head gives
        them; only the rest is dealt out anew among the others.

        Args:
            text: Logits, float [B, K].
            scores: Float [B, K].
            seen: Which classes were seen, bool [B, K] or [K]; by default those whose scores are
                not minus infinity. Where it is given, all scores must be finite.

        Returns:
            Log-probabilities, float [B, K].

        Example:
            >>> text, scores = torch.zeros(1, 3), torch.tensor([[9.0, 0.0, -torch.inf]])
            >>> Vote().combine(text, scores).exp().round(decimals=2)
            tensor([[0.6700, 0.0000, 0.3300]])
        """
        if seen is None:
            seen = scores > -torch.inf
            scores = scores.masked_fill(~seen, 0.0)
        prior = text.log_softmax(dim=1)
        mixed = self.text * text + self.statistics * scores
        # Finite: if no class was seen, infinity less infinity would be NaN, also in gradients.
        share = prior.masked_fill(~seen, torch.finfo(prior.dtype).min).logsumexp(1, keepdim=True)
        within = mixed.masked_fill(~seen, torch.finfo(mixed.dtype).min).log_softmax(dim=1)
        return torch.where(seen, share + within, prior)


def no_losses() -> Tensor:
    """The losses of no image yet, int64 [weights, temperatures]."""
    return torch.zeros(len(_WEIGHTS), len(_TEMPERATURES), dtype=torch.int64)


def vote_losses(
    text: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    elements_at_once: int = 2**16,
) -> Tensor:
    """Sum up the cross entropies of images, over the classes seen, for each vote there could be.

    Sums of several tasks may be added: the few classes of one say little about all others.

    Args:
        text: Logits of the text head, float [B, C].
        scores: Of the statistics without the image itself (`leave_one_out_scores`), float [B, C],
            minus infinity for classes not seen.
        labels: Classes of the images, int64 [B].
        total: Sums an int64 tensor over all processes.
        elements_at_once: Few enough for the processor's cache.

    Returns:
        Sums in steps of 2^-12, int64 [weights, temperatures], on the CPU.
    """
    losses, seen = no_losses(), (scores > -torch.inf).any(dim=0)
    rows = max(1, elements_at_once // max(1, int(seen.sum())))
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        losses += _losses(text[part].double(), scores[part].double(), labels[part, None], seen)
    return total(losses).cpu()


def choose_vote(losses: Tensor) -> Vote:
    """Choose both factors by the smallest sum of losses; the default vote if there is no image.

    Their ratio decides what is predicted. With the text's factor fixed, the best factor of the
    scores would be one that dampens them, since a discriminant is far too sure of itself.

    Args:
        losses: Sums of what `vote_losses` found, int64 [weights, temperatures].

    Returns:
        The vote.
    """
    if not int(losses.max()):
        return Vote()
    row, column = divmod(int(losses.argmin()), len(_TEMPERATURES))
    return Vote(_TEMPERATURES[column], _TEMPERATURES[column] * _WEIGHTS[row])


def _losses(text: Tensor, scores: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Sums of cross entropies by weight and temperature, in steps; labels are [B, 1]."""
    own_text, own_scores = text.gather(1, labels), scores.gather(1, labels)
    text, scores = text[:, seen], scores[:, seen]
    losses = no_losses()
    for row, weight in enumerate(_WEIGHTS):
        mixed = text + weight * scores
        highest = mixed.amax(dim=1, keepdim=True)
        below = (own_text + weight * own_scores - highest)[:, 0]
        mixed -= highest
        # Temperatures that are two apart differ by a factor of 2: a square in place of an
        # exponential, which would take ten times as long.
        for first in (0, 1):
            powers = (_TEMPERATURES[first] * mixed).exp_()
            for column in range(first, len(_TEMPERATURES), 2):
                # More is as wrong as can be, and would not fit the whole numbers.
                loss = (powers.sum(dim=1).log() - _TEMPERATURES[column] * below).clamp(max=2.0**10)
                losses[row, column] = (loss / _STEP).round().long().sum()
                powers.square_()
    return losses
