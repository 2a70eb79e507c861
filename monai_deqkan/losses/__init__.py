"""Losses that MONAI lacks."""

from monai_deqkan.losses.perpendicular import PerpendicularLoss, perpendicular_distance

__all__ = ["PerpendicularLoss", "perpendicular_distance"]
