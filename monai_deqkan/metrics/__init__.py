"""Metrics that MONAI lacks."""

from monai_deqkan.metrics.calibration import (
    ReliabilityBins,
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from monai_deqkan.metrics.classification import (
    Interval,
    bootstrap_intervals,
    classification_scores,
    decide,
    stratified_resamples,
)
from monai_deqkan.metrics.reconstruction import (
    NMSEMetric,
    ReferencePSNRMetric,
    ReferenceSSIMMetric,
    ReferenceVIFMetric,
    head_region,
    magnitude,
    nmse,
    psnr,
    ssim,
    vif,
    volume_metrics,
)
from monai_deqkan.metrics.spread_calibration import SpreadCalibration, fit_spread_factor, spread_calibration
from monai_deqkan.metrics.training_range import (
    border_signal,
    image_statistics,
    kspace_statistics,
    outside_training,
    training_ranges,
)

__all__ = [
    "Interval",
    "NMSEMetric",
    "ReferencePSNRMetric",
    "ReferenceSSIMMetric",
    "ReferenceVIFMetric",
    "ReliabilityBins",
    "SpreadCalibration",
    "bootstrap_intervals",
    "border_signal",
    "choose_threshold",
    "classification_scores",
    "decide",
    "expected_calibration_error",
    "fit_spread_factor",
    "fit_temperature",
    "head_region",
    "image_statistics",
    "kspace_statistics",
    "magnitude",
    "nmse",
    "outside_training",
    "psnr",
    "reliability_bins",
    "spread_calibration",
    "ssim",
    "stratified_resamples",
    "training_ranges",
    "vif",
    "volume_metrics",
]
