"""The linear discriminant of class statistics, and the scores of their own images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.class_statistics.moments import ClassGaussians


@dataclass(frozen=True)
class Discriminant:
    """Scores of classes that are linear in the features.

    Attributes:
        weight: float64 [C, D].
        bias: float64 [C]; minus infinity for a class not seen.
        shrinkage: The share of the identity in the covariance, 0 to 1.

    Reference:
        Hayes & Kanan, Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis,
        CVPR Workshops 2020, with the shrinkage of Chen et al. 2010 instead of a constant.
    """

    weight: Tensor
    bias: Tensor
    shrinkage: float

    @classmethod
    def of(cls, gaussians: ClassGaussians) -> Discriminant:
        """Find the discriminant: log densities up to what all classes share, all equally likely."""
        covariance, shrinkage = gaussians.covariance()
        weight = torch.linalg.solve(covariance, gaussians.means.T).T
        bias = -0.5 * (weight * gaussians.means).sum(dim=1)
        return cls(weight, bias.masked_fill(~gaussians.seen, -torch.inf), shrinkage)

    def scores(self, vectors: Tensor) -> Tensor:
        """Score vectors, float [B, D]; the scores are float64 [B, C]."""
        return vectors.double() @ self.weight.T + self.bias


def leave_one_out_scores(
    vectors: Tensor, labels: Tensor, gaussians: ClassGaussians, *, rows_at_once: int = 1024
) -> Tensor:
    """Score each vector by the statistics of all others, without computing them anew.

    To leave out v of class c with n vectors takes the mean to m - (v - m) / (n - 1) and the scatter
    down by n / (n - 1) (v - m)(v - m)^T, a change of rank one. Degrees of freedom, shrinkage and
    the size of the identity are kept as they are.

    Args:
        vectors: Vectors that are in the statistics, of classes with two or more, float [B, D].
        labels: Their classes, int64 [B].
        gaussians: The statistics.
        rows_at_once: Bounds the memory: 1024 rows of scores of 1000 classes take 8 MB.

    Returns:
        Scores up to a constant for each vector, float64 [B, C].

    Reference:
        Sherman & Morrison, Annals of Mathematical Statistics 1950.
    """
    covariance, shrinkage = gaussians.covariance()
    inverse = torch.linalg.inv(covariance)
    weight = (1.0 - shrinkage) / gaussians.freedom  # of a scatter in the covariance
    means = gaussians.means
    towards = means @ inverse
    scores = torch.empty(len(vectors), len(means), dtype=torch.float64)
    for start in range(0, len(vectors), rows_at_once):
        part = slice(start, start + rows_at_once)
        rows, classes = vectors[part].double(), labels[part, None]
        count = gaussians.counts[classes]
        ratio = count / (count - 1.0)
        residual = rows - means[classes[:, 0]]
        whitened = residual @ inverse
        length = (residual * whitened).sum(dim=1, keepdim=True)
        share = weight * ratio
        # Just below 1 where a vector alone spans a direction: what is left there has no variance.
        growth = share / (1.0 - share * length).clamp(min=1e-6)
        # Squared Mahalanobis distances to all means, first with the vector in the statistics.
        distance = (rows @ inverse * rows).sum(dim=1, keepdim=True) - 2.0 * rows @ towards.T
        distance += (towards * means).sum(dim=1)
        overlap = (rows * whitened).sum(dim=1, keepdim=True) - whitened @ means.T
        distance += growth * overlap**2
        distance.scatter_(1, classes, ratio**2 * (length + growth * length**2))
        scores[part] = -0.5 * distance
    return scores.masked_fill_(~gaussians.seen, -torch.inf)
