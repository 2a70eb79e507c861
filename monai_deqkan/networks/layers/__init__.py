"""Layers without knowledge of the task."""

from monai_deqkan.networks.layers.basis import BASES, Basis, BSplineBasis
from monai_deqkan.networks.layers.kan_activation import KANActivation
from monai_deqkan.networks.layers.kan_conv import KANConv1d, KANConv2d, KANConv3d
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.kan_linear import KANLinear

__all__ = [
    "BASES",
    "BSplineBasis",
    "Basis",
    "KANActivation",
    "KANConv1d",
    "KANConv2d",
    "KANConv3d",
    "KANLayer",
    "KANLinear",
]
