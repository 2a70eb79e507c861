"""Losses that MONAI lacks."""

from monai_deqkan.losses.jacobian import JacobianLoss, JacobianRegularizedLoss
from monai_deqkan.losses.kan import KANL2Loss, KANPenalty, KANSmoothnessLoss, KANSparsityLoss, RegularizedLoss
from monai_deqkan.losses.perpendicular import PerpendicularLoss, perpendicular_distance

__all__ = [
    "JacobianLoss",
    "JacobianRegularizedLoss",
    "KANL2Loss",
    "KANPenalty",
    "KANSmoothnessLoss",
    "KANSparsityLoss",
    "PerpendicularLoss",
    "RegularizedLoss",
    "perpendicular_distance",
]
