"""Linear forward models of MRI."""

from monai_deqkan.operators.base import AdjointOperator, ComposedOperator, LinearOperator, take_rows
from monai_deqkan.operators.coils import CoilOperator, combine_map_sets
from monai_deqkan.operators.espirit import espirit_maps
from monai_deqkan.operators.fourier import FourierOperator
from monai_deqkan.operators.map_misfit import map_misfit
from monai_deqkan.operators.masks import (
    MASKS,
    equispaced_mask,
    gaussian_mask,
    gaussian_plane_mask,
    poisson_disc_mask,
    pseudo_radial_mask,
    random_mask,
)
from monai_deqkan.operators.mri import MRIOperator
from monai_deqkan.operators.noise import drop_lines, estimate_noise_level
from monai_deqkan.operators.nufft import NUFFTOperator
from monai_deqkan.operators.sampling import SamplingOperator, infer_mask, net_acceleration
from monai_deqkan.operators.sensitivity import estimate_sensitivity_maps, low_frequency_images
from monai_deqkan.operators.simulate import add_complex_noise, simulate_kspace, smooth_coil_maps, smooth_phase
from monai_deqkan.operators.trajectories import golden_angle_trajectory, radial_trajectory, spiral_trajectory

__all__ = [
    "MASKS",
    "AdjointOperator",
    "CoilOperator",
    "ComposedOperator",
    "FourierOperator",
    "LinearOperator",
    "MRIOperator",
    "NUFFTOperator",
    "SamplingOperator",
    "add_complex_noise",
    "combine_map_sets",
    "drop_lines",
    "equispaced_mask",
    "espirit_maps",
    "estimate_noise_level",
    "estimate_sensitivity_maps",
    "gaussian_mask",
    "gaussian_plane_mask",
    "golden_angle_trajectory",
    "infer_mask",
    "low_frequency_images",
    "map_misfit",
    "net_acceleration",
    "poisson_disc_mask",
    "pseudo_radial_mask",
    "radial_trajectory",
    "random_mask",
    "simulate_kspace",
    "smooth_coil_maps",
    "smooth_phase",
    "spiral_trajectory",
    "take_rows",
]
