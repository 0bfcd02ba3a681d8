"""Class statistics of image features: exact sums, discriminants, drift compensation, the vote.

Knows tensors only: no image, no module in training, no trainer.
"""

from cl_merge.class_statistics.class_scatters import ClassScatters
from cl_merge.class_statistics.discriminant import (
    Discriminant,
    QuadraticDiscriminant,
    leave_one_out_scores,
)
from cl_merge.class_statistics.drift import DriftCompensation
from cl_merge.class_statistics.fused_head import fused_map, fused_projection
from cl_merge.class_statistics.moments import ClassGaussians, FeatureMoments, oas_shrinkage, unit
from cl_merge.class_statistics.stream_statistics import ENCODERS, StreamStatistics
from cl_merge.class_statistics.vote import Vote, choose_vote, vote_losses

__all__ = [
    "ENCODERS",
    "ClassGaussians",
    "ClassScatters",
    "Discriminant",
    "DriftCompensation",
    "FeatureMoments",
    "QuadraticDiscriminant",
    "StreamStatistics",
    "Vote",
    "choose_vote",
    "fused_map",
    "fused_projection",
    "leave_one_out_scores",
    "oas_shrinkage",
    "unit",
    "vote_losses",
]
