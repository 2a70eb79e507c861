"""Layers put together for reuse."""

from monai_deqkan.networks.blocks.data_consistency import Measurement, gradient_step
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

__all__ = [
    "CertifiedCell",
    "CertifiedMap",
    "ContractionBound",
    "ImageFeatures",
    "KANBlock",
    "KANCell",
    "KANGate",
    "KANTokenBlock",
    "KANUpsample",
    "MLPCell",
    "Measurement",
    "ReconstructionCell",
    "gradient_step",
]
