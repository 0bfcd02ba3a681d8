"""Discriminants of class statistics, linear and quadratic, and the scores of their own images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_merge.class_statistics.class_scatters import ClassScatters
from cl_merge.class_statistics.moments import ClassGaussians

# How many images of its own a class's covariance is to have, to count as much as the shared one:
# so many times the number of features.
PRIOR = 4.0

# Bounds the memory: of 1000 classes in 32 directions each 256 rows take 64 MB.
_ROWS_AT_ONCE = 256


class Discriminant(nn.Module):
    """Scores of classes that are linear in the features.

    Attributes:
        weight: float64 [C, D], as `of` makes it.
        bias: The same, [C]; minus infinity for a class not seen.
        shrinkage: The share of the identity in the covariance, 0 to 1.

    Reference:
        Hayes & Kanan, Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis,
        CVPR Workshops 2020, with the shrinkage of Chen et al. 2010 instead of a constant.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, shrinkage: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.shrinkage = shrinkage

    @classmethod
    def of(cls, gaussians: ClassGaussians) -> Discriminant:
        """Find the discriminant: log densities up to what all classes share, all equally likely."""
        covariance, shrinkage = gaussians.covariance()
        weight = torch.linalg.solve(covariance, gaussians.means.T).T
        bias = -0.5 * (weight * gaussians.means).sum(dim=1)
        return cls(weight, bias.masked_fill(~gaussians.seen, -torch.inf), shrinkage)

    def scores(self, vectors: Tensor) -> Tensor:
        """Score vectors, float [B, D]; the scores are [B, C], as precise as the weight."""
        return vectors.to(self.weight.dtype) @ self.weight.T + self.bias

    @property
    def steepness(self) -> float:
        """By how much a score can change where a vector changes by one."""
        return float(self.weight.norm(dim=1).max())


class QuadraticDiscriminant(nn.Module):
    r"""Scores of classes that each have a covariance of their own, quadratic in the features.

    The covariance of a class with n images and the scatter S is drawn towards the one that all
    classes share, :math:`\Sigma`, with the weight of k = 4 D images:

    .. math::
        \Sigma_c = (k \Sigma + S) / (k + n - 1), \quad
        -\tfrac12 (v - m)^T \Sigma_c^{-1} (v - m) - \tfrac12 \log \det \Sigma_c

    As S is a few directions and a rest (`ClassScatters`), what it takes beyond a linear
    discriminant is a product with R directions for each class.

    Args:
        gaussians: The statistics of all classes.
        scatters: The scatter of each.

    Attributes:
        centre: Mean of the means of classes seen, float64 [D].
        whitening: Takes what is left around it to where the shared covariance is the identity,
            float64 [D, D].
        means: Of the classes, there, float64 [C, D].
        directions: In which a class varies more than all do, there, float64 [C, R, D].
        factors: Of squared distances, float64 [C].
        offsets: Scores of the means, float64 [C]; minus infinity for a class not seen.

    Reference:
        Friedman, Regularized Discriminant Analysis, Journal of the American Statistical
        Association 1989.
    """

    centre: Tensor
    whitening: Tensor
    means: Tensor
    directions: Tensor
    factors: Tensor
    offsets: Tensor

    def __init__(self, gaussians: ClassGaussians, scatters: ClassScatters) -> None:
        super().__init__()
        seen, size = gaussians.seen, gaussians.means.shape[1]
        shared = gaussians.covariance()[0]
        root = torch.linalg.cholesky(shared)
        identity = torch.eye(size, dtype=torch.float64)
        whitening = torch.linalg.solve_triangular(root, identity, upper=False)
        centre = gaussians.means[seen].mean(dim=0)
        freedom = PRIOR * size + (gaussians.counts - 1.0).clamp(min=0.0)
        # With F whitened, k Sigma + S is a (I + F^T F / a) there.
        share = PRIOR * size + scatters.rests
        whitened = scatters.factors.double() @ whitening.T
        products = whitened @ whitened.mT + share[:, None, None] * torch.eye(whitened.shape[1])
        roots = torch.linalg.cholesky(products)
        logs = 2.0 * roots.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        logs += (size - whitened.shape[1]) * share.log() - size * freedom.log()
        logs += 2.0 * root.diagonal().log().sum()
        self.register_buffer("centre", centre)
        self.register_buffer("whitening", whitening)
        self.register_buffer("means", (gaussians.means - centre) @ whitening.T)
        self.register_buffer(
            "directions", torch.linalg.solve_triangular(roots, whitened, upper=False)
        )
        self.register_buffer("factors", freedom / share)
        self.register_buffer("offsets", (-0.5 * logs).masked_fill(~seen, -torch.inf))
        self._freedom, self._counts = freedom, gaussians.counts

    def scores(self, vectors: Tensor) -> Tensor:
        """Score vectors, float [B, D]; the scores are [B, C], as precise as the means."""
        return self.offsets - 0.5 * self._distances(vectors)

    def leave_one_out_scores(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Score each vector by the statistics of all others, without computing them anew.

        Its class's mean and scatter are without it; the shared covariance is as it was. A change of
        rank one (Sherman & Morrison 1950).

        Args:
            vectors: Vectors that are in the statistics, of classes with two or more, float [B, D].
            labels: Their classes, int64 [B].

        Returns:
            Scores, float64 [B, C].
        """
        pieces = (torch.split(whole, _ROWS_AT_ONCE) for whole in (vectors, labels))
        return torch.cat([self._left_out(*pair) for pair in zip(*pieces, strict=True)])

    @property
    def steepness(self) -> float:
        """By how much a score can change where a vector changes by one, at most."""
        apart = 2.0 * self.means.norm(dim=1).max() * torch.linalg.matrix_norm(self.whitening, 2)
        return float(self.factors.max() * apart)

    def _left_out(self, vectors: Tensor, labels: Tensor) -> Tensor:
        distances = self._distances(vectors)
        scores, own = self.offsets - 0.5 * distances, labels[:, None]
        count, freedom = self._counts[own], self._freedom[own]
        ratio = count / (count - 1.0)
        part = distances.gather(1, own) / freedom
        left = (1.0 - ratio * part).clamp(min=1e-6)
        size = vectors.shape[1]
        logs = left.log() + size * (freedom.log() - (freedom - 1.0).log())
        without = (freedom - 1.0) * ratio**2 * part / left + logs
        return scores.scatter(1, own, self.offsets[own] - 0.5 * without)

    def _distances(self, vectors: Tensor) -> Tensor:
        """Squared Mahalanobis distances [B, C] to the means by each class's own covariance."""
        here = (vectors.to(self.means.dtype) - self.centre) @ self.whitening.T
        squares = (here * here).sum(dim=1, keepdim=True) - 2.0 * here @ self.means.T
        squares = squares + (self.means * self.means).sum(dim=1)
        classes, rank, size = self.directions.shape
        along = (here @ self.directions.reshape(-1, size).T).reshape(-1, classes, rank)
        along = along - (self.directions @ self.means[:, :, None])[:, :, 0]
        return self.factors * (squares - (along * along).sum(dim=2))


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
