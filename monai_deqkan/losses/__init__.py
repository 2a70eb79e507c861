"""Losses that MONAI lacks."""

from monai_deqkan.losses.denoising import DenoisingLoss
from monai_deqkan.losses.jacobian import JacobianLoss, JacobianRegularizedLoss
from monai_deqkan.losses.kan import KANL2Loss, KANPenalty, KANSmoothnessLoss, KANSparsityLoss, RegularizedLoss
from monai_deqkan.losses.perpendicular import PerpendicularLoss, perpendicular_distance
from monai_deqkan.losses.reconstruction import ReconstructionLoss

__all__ = [
    "DenoisingLoss",
    "JacobianLoss",
    "JacobianRegularizedLoss",
    "KANL2Loss",
    "KANPenalty",
    "KANSmoothnessLoss",
    "KANSparsityLoss",
    "PerpendicularLoss",
    "ReconstructionLoss",
    "RegularizedLoss",
    "perpendicular_distance",
]
