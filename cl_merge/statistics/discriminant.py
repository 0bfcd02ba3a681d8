"""The linear discriminant of class statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.statistics.gaussians import ClassGaussians


@dataclass(frozen=True)
class Discriminant:
    """Scores of classes that are linear in the features.

    Attributes:
        weight: float64 [C, D].
        bias: float64 [C]; minus infinity for a class not seen.
        shrinkage: The share of the identity in the covariance, 0 to 1.

    Reference:
        Hayes & Kanan, Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis,
        CVPR Workshops 2020, with the shrinkage of Chen et al. 2010 in the place of a constant.
    """

    weight: Tensor
    bias: Tensor
    shrinkage: float

    @classmethod
    def of(cls, gaussians: ClassGaussians) -> Discriminant:
        """Find the discriminant: log densities up to what all classes share.

        Args:
            gaussians: The statistics.

        Returns:
            The discriminant, with all classes equally likely beforehand.
        """
        covariance, shrinkage = gaussians.covariance()
        weight = torch.linalg.solve(covariance, gaussians.means.T).T
        bias = -0.5 * (weight * gaussians.means).sum(dim=1)
        return cls(weight, bias.masked_fill(~gaussians.seen, -torch.inf), shrinkage)

    def scores(self, vectors: Tensor) -> Tensor:
        """Score vectors.

        Args:
            vectors: Float [B, D].

        Returns:
            Float64 [B, C].
        """
        return vectors.double() @ self.weight.T + self.bias


def left_out_scores(vectors: Tensor, labels: Tensor, gaussians: ClassGaussians) -> Tensor:
    """Score vectors by statistics from which each itself is left out, without computing them anew.

    To leave out v of class c with n vectors takes the mean to m - (v - m) / (n - 1) and the scatter
    down by n / (n - 1) (v - m)(v - m)^T, a change of rank one. Degrees of freedom, shrinkage and
    the size of the identity are kept as they are.

    Args:
        vectors: Vectors that are in the statistics, of classes with two or more, float [B, D].
        labels: Their classes, int64 [B].
        gaussians: The statistics.

    Returns:
        Scores up to a constant for each vector, float64 [B, C].

    Reference:
        Sherman & Morrison, Annals of Mathematical Statistics 1950.
    """
    vectors = vectors.double()
    covariance, shrinkage = gaussians.covariance()
    inverse = torch.linalg.inv(covariance)
    means, count = gaussians.means, gaussians.counts[labels]
    ratio = count / (count - 1.0)
    residual = vectors - means[labels]
    whitened = residual @ inverse
    length = (residual * whitened).sum(dim=1)
    share = (1.0 - shrinkage) / gaussians.freedom * ratio
    # Just below 1 where a vector alone spans a direction: what is left there has no variance.
    growth = share / (1.0 - share * length).clamp(min=1e-6)
    # Squared Mahalanobis distances to all means, first with the vector in the statistics.
    towards = means @ inverse
    distance = (vectors @ inverse * vectors).sum(dim=1, keepdim=True) - 2.0 * vectors @ towards.T
    distance = distance + (towards * means).sum(dim=1)
    overlap = (vectors * whitened).sum(dim=1, keepdim=True) - whitened @ means.T
    distance = distance + growth[:, None] * overlap**2
    own = ratio**2 * (length + growth * length**2)
    distance = distance.scatter(1, labels[:, None], own[:, None])
    scores: Tensor = (-0.5 * distance).masked_fill(~gaussians.seen, -torch.inf)
    return scores
