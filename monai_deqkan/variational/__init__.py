"""Reconstruction without learning: the start of an equilibrium, and its rivals."""

from monai_deqkan.variational.cg_sense import cg_sense, cg_sense_path
from monai_deqkan.variational.regularized import VariationalSolution
from monai_deqkan.variational.total_variation import tv_sense
from monai_deqkan.variational.wavelet import inverse_wavelet_transform, wavelet_sense, wavelet_transform

__all__ = [
    "VariationalSolution",
    "cg_sense",
    "cg_sense_path",
    "inverse_wavelet_transform",
    "tv_sense",
    "wavelet_sense",
    "wavelet_transform",
]
