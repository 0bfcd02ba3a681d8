"""Class statistics of image features: exact sums, discriminants, and what carries them on.

Knows tensors only: no image, no module in training, no trainer.
"""

from cl_merge.class_statistics.discriminant import Discriminant, left_out_scores
from cl_merge.class_statistics.drift import CarriedStatistics
from cl_merge.class_statistics.fused_head import align, aligned_projection
from cl_merge.class_statistics.gaussians import ClassGaussians, oas_shrinkage
from cl_merge.class_statistics.heads import EnsembleHead, StatisticsHead
from cl_merge.class_statistics.moments import FeatureMoments, unit
from cl_merge.class_statistics.stream_statistics import ENCODERS, StreamStatistics
from cl_merge.class_statistics.vote import Vote, choose_vote

__all__ = [
    "ENCODERS",
    "CarriedStatistics",
    "ClassGaussians",
    "Discriminant",
    "EnsembleHead",
    "FeatureMoments",
    "StatisticsHead",
    "StreamStatistics",
    "Vote",
    "align",
    "aligned_projection",
    "choose_vote",
    "left_out_scores",
    "oas_shrinkage",
    "unit",
]
