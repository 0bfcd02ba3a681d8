"""Drift compensation: class statistics of an encoder that changes, without earlier images."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_merge.class_statistics.moments import ClassGaussians, FeatureMoments, TensorState

RIDGE = 0.5
HOLD = 0.5
# Those of statistics that were saved before there was a hold.
FORMER_RIDGE, FORMER_HOLD = 2.0, 0.0


class DriftCompensation(TensorState):
    r"""Statistics of features m under the merged model of today, for images that are gone.

    Statistics of the base encoder's features b stay true. A linear drift map from b to m is kept;
    each task corrects it by a ridge regression on its own images, towards what it was before, and
    least where it would move earlier images most:

    .. math::
        W = (C_{bb} + r I + h C_{old})^{-1} (C_{bm} - C_{bb} G), \quad G \leftarrow G + W

    with the covariances C of the task's images, and C_old of the base features of all images of
    earlier tasks around their mean. The same correction moves the statistics of all
    earlier classes: m becomes m + W^T b + c, so that with the scatters S of old images

    .. math::
        S_{mm} \leftarrow S_{mm} + W^T S_{bb} W + W^T S_{bm} + S_{bm}^T W, \quad
        S_{bm} \leftarrow S_{bm} + S_{bb} W

    Args:
        classes: Number of classes, C.
        features: Length of the features, D.
        ridge: r in units of the mean variance of a task's base features. The map is corrected in
            directions in which the task's images vary more than that.
        hold: h; 0 corrects the map by the task's images alone.

    Attributes:
        means: Of m by class, float64 [C, D].
        scatter: Of m around them, S_mm, float64 [D, D].
        cross: Of b and m around them, S_bm, float64 [D, D].
        weight: G, float64 [D, D].
        bias: float64 [D].
    """

    def __init__(
        self, classes: int, features: int, ridge: float = RIDGE, hold: float = HOLD
    ) -> None:
        zeros = torch.zeros(features, features, dtype=torch.float64)
        self.ridge, self.hold = ridge, hold
        self.means = torch.zeros(classes, features, dtype=torch.float64)
        self.scatter, self.cross = zeros.clone(), zeros.clone()
        self.weight = torch.eye(features, dtype=torch.float64)
        self.bias = torch.zeros(features, dtype=torch.float64)

    def update(self, before: FeatureMoments, task: FeatureMoments) -> None:
        """Move the statistics to the merged model after a task, and add the task's images.

        Args:
            before: Of the base features of all tasks before, D features.
            task: Of base and merged features side by side, of the task's images, 2 D features.
        """
        old, new = ClassGaussians.of(before), ClassGaussians.of(task)
        size = len(self.weight)
        if not new.counts.any():
            return
        weight, bias = self._correction(old, new)
        # New tensors, none in place: what `gaussians` and `tensors` gave away stays as it was.
        means = self.means + (old.means @ weight + bias) * old.seen[:, None]
        moved = weight.T @ self.cross
        scatter = self.scatter + weight.T @ old.scatter @ weight + moved + moved.T
        cross = self.cross + old.scatter @ weight
        # The statistics of both, by class (Chan, Golub & LeVeque 1979).
        apart_b = new.means[:, :size] - old.means
        apart_m = new.means[:, size:] - means
        total = (old.counts + new.counts).clamp(min=1)
        pairs = (old.counts * new.counts / total)[:, None]
        self.scatter = scatter + new.scatter[size:, size:] + (pairs * apart_m).T @ apart_m
        self.cross = cross + new.scatter[:size, size:] + (pairs * apart_b).T @ apart_m
        self.means = means + apart_m * (new.counts / total)[:, None]
        self.weight = self.weight + weight
        self.bias = self.bias + bias

    def gaussians(self, counts: Tensor) -> ClassGaussians:
        """The distributions of m, given the images of each class so far, int64 [C]."""
        return ClassGaussians(counts.double(), self.means, self.scatter)

    def _correction(self, old: ClassGaussians, task: ClassGaussians) -> tuple[Tensor, Tensor]:
        """W and c of the class's docstring."""
        size = len(self.weight)
        mean, covariance = task.total_covariance()
        base, both = covariance[:size, :size], covariance[:size, size:]
        # A single image says where features have moved to, but not how they vary.
        strength = max(self.ridge * float(base.diagonal().mean()), 1e-12)
        penalty = strength * torch.eye(size, dtype=torch.float64)
        penalty += self.hold * old.total_covariance()[1]
        weight = torch.linalg.solve(base + penalty, both - base @ self.weight)
        bias = mean[size:] - mean[:size] @ (self.weight + weight) - self.bias
        return weight, bias
