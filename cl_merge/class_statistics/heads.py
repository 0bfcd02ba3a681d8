"""Classifiers made of class statistics, alone and together with the text head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_merge.class_statistics.discriminant import Discriminant
from cl_merge.class_statistics.vote import Vote
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead


class StatisticsHead(nn.Module):
    """Classify image features by a linear discriminant. Nothing in it trains.

    Args:
        discriminant: Over C classes and D features.

    Example:
        >>> weight, bias = torch.eye(2).double(), torch.tensor([0.0, -torch.inf]).double()
        >>> head = StatisticsHead(Discriminant(weight, bias, shrinkage=0.0))
        >>> head(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000,   -inf]])
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, discriminant: Discriminant) -> None:
        super().__init__()
        self.register_buffer("weight", discriminant.weight.float())
        self.register_buffer("bias", discriminant.bias.float())

    def forward(self, features: Tensor, classes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Score image features against all classes or some of them.

        Args:
            features: ``[B, D]`` image features of any floating-point type, not normalised.
            classes: Which ``K`` classes, in the order wanted; all without it.

        Returns:
            ``[B, K]`` (or ``[B, C]``) scores, float32; minus infinity for classes not seen.
        """
        weight, bias = self.weight, self.bias
        if classes is not None:
            rows = torch.as_tensor(classes, dtype=torch.long, device=weight.device)
            weight, bias = weight[rows], bias[rows]
        # As in the text head: half precision would round the scores too coarsely.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(F.normalize(features.float(), dim=-1), weight.float(), bias.float())

    def extra_repr(self) -> str:
        """Show the number of classes and features when the module is printed."""
        classes, features = self.weight.shape
        seen = int((self.bias > -torch.inf).sum())
        return f"classes={classes}, seen={seen}, features={features}"


class EnsembleHead(nn.Module):
    """The text head and one or several statistics heads, which vote.

    Args:
        text: The text head over C classes.
        statistics: Heads over the same classes, each for the features of one encoder; their scores
            are averaged.
        vote: How much they count.

    Raises:
        InputError: If the heads differ in their number of classes, or there are no statistics.
    """

    def __init__(
        self, text: ZeroShotHead, statistics: Sequence[StatisticsHead], vote: Vote
    ) -> None:
        super().__init__()
        sizes = {len(head.weight) for head in statistics}
        if sizes != {len(text.weight)}:
            raise InputError(
                f"statistics of {sorted(sizes)} classes beside a text head of {len(text.weight)}; "
                "expected as many"
            )
        self.text = text
        self.statistics = nn.ModuleList(statistics)
        self.vote = vote

    def forward(
        self,
        features: Tensor,
        others: Sequence[Tensor],
        classes: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Classify.

        Args:
            features: ``[B, D]`` image features for the text head.
            others: For each statistics head the features of its encoder, ``[B, D]``.
            classes: Which ``K`` classes, in the order wanted; all without it.

        Returns:
            Log-probabilities, float32 ``[B, K]``.
        """
        text = self.text(features, classes)
        pairs = zip(self.statistics, others, strict=True)
        scores = torch.stack([head(given, classes) for head, given in pairs]).mean(dim=0)
        return self.vote.combine(text, scores)
