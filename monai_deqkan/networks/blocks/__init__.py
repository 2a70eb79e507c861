"""Layers put together for reuse."""

from monai_deqkan.networks.blocks.data_consistency import Measurement, gradient_step, proximal_step
from monai_deqkan.networks.blocks.deq_cell import (
    CertifiedCell,
    CertifiedMap,
    ContractionBound,
    KANCell,
    MLPCell,
    ReconstructionCell,
)
from monai_deqkan.networks.blocks.image_features import ImageFeatures
from monai_deqkan.networks.blocks.kan_block import KANBlock
from monai_deqkan.networks.blocks.kan_gate import KANGate
from monai_deqkan.networks.blocks.kan_tokens import KANTokenBlock
from monai_deqkan.networks.blocks.kan_upsample import KANUpsample
from monai_deqkan.networks.blocks.reconstruction_cells import ConjugateGradientCell, GradientCell, ProximalCell
from monai_deqkan.networks.blocks.reweighted_cell import EnergyPrior, ReweightedCell

__all__ = [
    "CertifiedCell",
    "CertifiedMap",
    "ConjugateGradientCell",
    "ContractionBound",
    "EnergyPrior",
    "GradientCell",
    "ImageFeatures",
    "KANBlock",
    "KANCell",
    "KANGate",
    "KANTokenBlock",
    "KANUpsample",
    "MLPCell",
    "Measurement",
    "ProximalCell",
    "ReconstructionCell",
    "ReweightedCell",
    "gradient_step",
    "proximal_step",
]
