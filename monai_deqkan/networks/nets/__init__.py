"""Whole networks with MONAI's constructor words."""

from monai_deqkan.networks.nets.convex_ridge_denoiser import ConvexRidgeDenoiser
from monai_deqkan.networks.nets.deq_reconstructor import DEQReconstructor
from monai_deqkan.networks.nets.deqkan_classifier import DEQKANClassifier
from monai_deqkan.networks.nets.dncnn import DnCNN
from monai_deqkan.networks.nets.hybrid_kan_unet import HybridKANUNet
from monai_deqkan.networks.nets.kan_unet import KANUNet
from monai_deqkan.networks.nets.recurrent_kan_classifier import RecurrentKANClassifier
from monai_deqkan.networks.nets.sensitivity_net import SensitivityNet
from monai_deqkan.networks.nets.ukan import UKAN
from monai_deqkan.networks.nets.unet_denoiser import UNetDenoiser
from monai_deqkan.networks.nets.unrolled_reconstructor import UnrolledReconstructor
from monai_deqkan.networks.nets.weakly_convex_ridge_denoiser import WeaklyConvexRidgeDenoiser

__all__ = [
    "UKAN",
    "ConvexRidgeDenoiser",
    "DEQKANClassifier",
    "DEQReconstructor",
    "DnCNN",
    "HybridKANUNet",
    "KANUNet",
    "RecurrentKANClassifier",
    "SensitivityNet",
    "UNetDenoiser",
    "UnrolledReconstructor",
    "WeaklyConvexRidgeDenoiser",
]
