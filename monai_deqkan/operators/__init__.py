"""Linear forward models of MRI."""

from monai_deqkan.operators.base import AdjointOperator, ComposedOperator, LinearOperator, take_rows
from monai_deqkan.operators.coils import CoilOperator
from monai_deqkan.operators.fourier import FourierOperator
from monai_deqkan.operators.mri import MRIOperator
from monai_deqkan.operators.sampling import (
    SamplingOperator,
    equispaced_mask,
    infer_mask,
    net_acceleration,
    random_mask,
)
from monai_deqkan.operators.sensitivity import estimate_sensitivity_maps
from monai_deqkan.operators.simulate import add_complex_noise, simulate_kspace, smooth_coil_maps, smooth_phase

__all__ = [
    "AdjointOperator",
    "CoilOperator",
    "ComposedOperator",
    "FourierOperator",
    "LinearOperator",
    "MRIOperator",
    "SamplingOperator",
    "add_complex_noise",
    "equispaced_mask",
    "estimate_sensitivity_maps",
    "infer_mask",
    "net_acceleration",
    "random_mask",
    "simulate_kspace",
    "smooth_coil_maps",
    "smooth_phase",
    "take_rows",
]
