"""Layers put together for reuse."""

from monai_deqkan.networks.blocks.data_consistency import Measurement, gradient_step
from monai_deqkan.networks.blocks.deq_cell import (
    CertifiedCell,
    CertifiedMap,
    ContractionBound,
    KANCell,
    ReconstructionCell,
)
from monai_deqkan.networks.blocks.kan_block import KANBlock

__all__ = [
    "CertifiedCell",
    "CertifiedMap",
    "ContractionBound",
    "KANBlock",
    "KANCell",
    "Measurement",
    "ReconstructionCell",
    "gradient_step",
]
