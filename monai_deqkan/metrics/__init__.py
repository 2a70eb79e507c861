"""Metrics that MONAI lacks."""

from monai_deqkan.metrics.classification import decide
from monai_deqkan.metrics.reconstruction import (
    NMSEMetric,
    ReferencePSNRMetric,
    ReferenceSSIMMetric,
    head_region,
    magnitude,
    nmse,
    psnr,
    ssim,
)

__all__ = [
    "NMSEMetric",
    "ReferencePSNRMetric",
    "ReferenceSSIMMetric",
    "decide",
    "head_region",
    "magnitude",
    "nmse",
    "psnr",
    "ssim",
]
