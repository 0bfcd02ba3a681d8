"""What each class varies in of its own, as a few directions beside the shared covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_merge.class_statistics.moments import ClassGaussians, TensorState

RANK = 32


class ClassScatters(TensorState):
    r"""The scatter of each class around its mean, as its strongest directions and the rest.

    A scatter S is seen through the covariance that all classes share, :math:`\Sigma = L L^T`: the
    largest eigenvalues e of :math:`L^{-1} S L^{-T}` stay with their vectors u, the others as their
    mean r,

    .. math:: S \approx F^T F + r \Sigma, \quad F = \sqrt{e - r}\, u^T L^T

    With as many directions as a class has images, or features, S is kept as it is and r is 0.

    Args:
        classes: Number of classes, C.
        features: Length of the features, D.
        rank: Directions of each class, R; at most D are kept.

    Attributes:
        factors: F, float32 [C, R, D]; zeros where a class varies in fewer directions.
        rests: r, float64 [C].
    """

    def __init__(self, classes: int, features: int, rank: int = RANK) -> None:
        self.factors = torch.zeros(classes, min(rank, features), features)
        self.rests = torch.zeros(classes, dtype=torch.float64)

    def update(
        self, label: int, images: ClassGaussians, before: ClassGaussians, shared: Tensor
    ) -> None:
        """Add a task's images of a class.

        Args:
            label: The class.
            images: Its images, as those of the only class.
            before: All classes before the task.
            shared: The covariance of all classes after the task, float64 [D, D].
        """
        scatter, old, new = images.scatter, float(before.counts[label]), float(images.counts[0])
        if old:  # of both, around their common mean (Chan, Golub & LeVeque 1979)
            apart = images.means[0] - before.means[label]
            scatter = scatter + old * new / (old + new) * apart[:, None] * apart
            scatter = scatter + self.scatter(label, shared)
        size, rank = len(shared), self.factors.shape[1]
        root = torch.linalg.cholesky(shared)
        half = torch.linalg.solve_triangular(root, scatter, upper=False)
        values, vectors = torch.linalg.eigh(
            torch.linalg.solve_triangular(root, half.T, upper=False)
        )
        values = values.clamp(min=0.0)
        # New tensors, none in place: what `tensors` gave away stays as it was.
        self.rests, self.factors = self.rests.clone(), self.factors.clone()
        whole = rank >= min(old + new - 1, size)
        self.rests[label] = 0.0 if whole else values[: size - rank].mean()
        strengths = (values[size - rank :] - self.rests[label]).clamp(min=0.0).sqrt()
        self.factors[label] = (root @ (vectors[:, size - rank :] * strengths)).T

    def scatter(self, label: int, shared: Tensor) -> Tensor:
        """The scatter of a class, float64 [D, D], given the shared covariance."""
        factor = self.factors[label].double()
        return factor.T @ factor + self.rests[label] * shared
