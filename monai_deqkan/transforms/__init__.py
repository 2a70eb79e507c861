"""Transforms in MONAI's array and dictionary forms."""

from monai_deqkan.transforms.image import LoadMask, LoadMaskd, LoadMedicalImage, LoadMedicalImaged
from monai_deqkan.transforms.kspace import (
    CropCoilImages,
    CropCoilImagesd,
    EstimateSensitivityMaps,
    EstimateSensitivityMapsd,
    ImageMagnitude,
    ImageMagnituded,
    LoadKspaceSlice,
    LoadKspaceSliced,
    NormalizeKspace,
    NormalizeKspaced,
    ReferenceImage,
    ReferenceImaged,
    UndersampleKspace,
    UndersampleKspaced,
    kspace_file_shape,
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
    "LoadMask",
    "LoadMaskd",
    "LoadMedicalImage",
    "LoadMedicalImaged",
    "NormalizeKspace",
    "NormalizeKspaced",
    "ReferenceImage",
    "ReferenceImaged",
    "UndersampleKspace",
    "UndersampleKspaced",
    "kspace_file_shape",
]
