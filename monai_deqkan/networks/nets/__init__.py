"""Whole networks with MONAI's constructor words."""

from monai_deqkan.networks.nets.dncnn import DnCNN
from monai_deqkan.networks.nets.kan_unet import KANUNet

__all__ = [
    "DnCNN",
    "KANUNet",
]
