"""A normal distribution for each class, all with one covariance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.class_statistics.moments import FeatureMoments

# The square of what vectors are rounded to: below it a variance is rounding.
_NO_VARIANCE = 2.0**-40


@dataclass(frozen=True)
class ClassGaussians:
    """Means by class and one scatter around them.

    Attributes:
        counts: Vectors of each class, float64 [C]; 0 for a class not seen.
        means: Their means, float64 [C, D]; 0 for a class not seen.
        scatter: Sum over all vectors of (v - mean)(v - mean)^T, float64 [D, D].

    Example:
        >>> moments = FeatureMoments(classes=1, features=2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> ClassGaussians.of(moments).scatter
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]], dtype=torch.float64)
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, moments: FeatureMoments) -> ClassGaussians:
        """Read the distributions off exact moments.

        Args:
            moments: Of C classes and D features.

        Returns:
            The distributions.
        """
        counts = moments.counts.double()
        means = moments.sums.double() * moments.step / counts.clamp(min=1)[:, None]
        products = moments.products.double() * moments.step**2
        return cls(counts, means, products - (means * counts[:, None]).T @ means)

    @property
    def seen(self) -> Tensor:
        """Which classes have vectors, bool [C]."""
        return self.counts > 0

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the scatter: vectors less classes, at least 1."""
        return max(int(self.counts.sum()) - int(self.seen.sum()), 1)

    def covariance(self) -> tuple[Tensor, float]:
        """The covariance within classes, shrunk towards a multiple of the identity.

        Returns:
            The matrix, float64 [D, D], and the share of the identity in it, 0 to 1.
        """
        sample = self.scatter / self.freedom
        size = float(sample.diagonal().mean())
        identity = torch.eye(len(sample), dtype=torch.float64)
        if size <= _NO_VARIANCE:  # no class has two different vectors: as good as any
            return identity, 1.0
        share = oas_shrinkage(sample, self.freedom)
        return (1.0 - share) * sample + share * size * identity, share

    def second_moment(self) -> tuple[Tensor, Tensor]:
        """Mean vector, float64 [D], and mean of v v^T, float64 [D, D], over all vectors."""
        total = self.counts.sum().clamp(min=1)
        weighted = self.means * self.counts[:, None]
        return weighted.sum(dim=0) / total, (self.scatter + weighted.T @ self.means) / total


def oas_shrinkage(covariance: Tensor, freedom: float) -> float:
    """How much of the identity to mix into a sample covariance: oracle approximating shrinkage.

    For p features, n degrees of freedom and the sample covariance S the share is, at most 1,

    .. math:: ((1 - 2/p) tr(S^2) + tr(S)^2) / ((n + 1 - 2/p) (tr(S^2) - tr(S)^2 / p))

    Args:
        covariance: S, float64 [D, D].
        freedom: n: vectors less the means that were subtracted from them.

    Returns:
        The share, 0 to 1.

    Reference:
        Chen, Wiesel, Eldar & Hero, Shrinkage Algorithms for MMSE Covariance Estimation, IEEE
        Transactions on Signal Processing 2010, equation 23.

    Example:
        >>> oas_shrinkage(torch.eye(2, dtype=torch.float64), freedom=10)
        1.0
    """
    size = len(covariance)
    square = float(covariance.diagonal().sum() ** 2)
    squares = float((covariance * covariance).sum())
    spread = (freedom + 1.0 - 2.0 / size) * (squares - square / size)
    if spread <= 0.0:
        return 1.0
    return min(1.0, ((1.0 - 2.0 / size) * squares + square) / spread)
