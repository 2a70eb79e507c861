"""Transforms of k-space."""

from monai_deqkan.transforms.kspace.array import (
    CropCoilImages,
    EstimateSensitivityMaps,
    ImageMagnitude,
    LoadKspaceSlice,
    NormalizeKspace,
    ReferenceImage,
    UndersampleKspace,
    kspace_file_shape,
)
from monai_deqkan.transforms.kspace.dictionary import (
    CropCoilImagesd,
    EstimateSensitivityMapsd,
    ImageMagnituded,
    LoadKspaceSliced,
    NormalizeKspaced,
    ReferenceImaged,
    UndersampleKspaced,
)

__all__ = [
    "CropCoilImages",
    "CropCoilImagesd",
    "EstimateSensitivityMaps",
    "EstimateSensitivityMapsd",
    "ImageMagnitude",
    "ImageMagnituded",
    "LoadKspaceSlice",
    "LoadKspaceSliced",
    "NormalizeKspace",
    "NormalizeKspaced",
    "ReferenceImage",
    "ReferenceImaged",
    "UndersampleKspace",
    "UndersampleKspaced",
    "kspace_file_shape",
]
