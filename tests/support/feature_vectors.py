"""Moments and distributions of given feature vectors, for the tests of class statistics."""

from __future__ import annotations

from torch import Tensor

from cl_merge.class_statistics import ClassGaussians, FeatureMoments


def on_grid(vectors: Tensor, steps: int = 2**20) -> Tensor:
    """Round to whole multiples of the moments' step, so that they round nothing themselves."""
    return (vectors * steps).round() / steps


def moments_of(vectors: Tensor, labels: Tensor, classes: int) -> FeatureMoments:
    made = FeatureMoments(classes, vectors.shape[1])
    made.update(vectors, labels)
    return made


def gaussians_of(vectors: Tensor, labels: Tensor, classes: int) -> ClassGaussians:
    return ClassGaussians.of(moments_of(vectors, labels, classes))
