"""Class statistics of image features: exact sums, discriminants, and what carries them on.

Knows tensors only: no image, no module in training, no trainer.
"""

from cl_merge.statistics.alignment import align, aligned_projection
from cl_merge.statistics.carried import CarriedStatistics
from cl_merge.statistics.discriminant import Discriminant, left_out_scores
from cl_merge.statistics.gaussians import ClassGaussians, oas_shrinkage
from cl_merge.statistics.heads import EnsembleHead, StatisticsHead
from cl_merge.statistics.learning import ENCODERS, StreamStatistics
from cl_merge.statistics.moments import FeatureMoments, unit
from cl_merge.statistics.vote import Vote, choose_vote

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
