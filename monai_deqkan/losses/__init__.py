"""Losses that MONAI lacks."""

from monai_deqkan.losses.kan import KANL2Loss, KANPenalty, KANSmoothnessLoss, KANSparsityLoss, RegularizedLoss
from monai_deqkan.losses.perpendicular import PerpendicularLoss, perpendicular_distance

__all__ = [
    "KANL2Loss",
    "KANPenalty",
    "KANSmoothnessLoss",
    "KANSparsityLoss",
    "PerpendicularLoss",
    "RegularizedLoss",
    "perpendicular_distance",
]
