"""Transforms of k-space."""

from monai_deqkan.transforms.kspace.array import (
    EstimateSensitivityMaps,
    LoadKspaceSlice,
    MaskKspace,
    NormalizeKspace,
    ReferenceImage,
    UndersampleKspace,
    kspace_file_shape,
)
from monai_deqkan.transforms.kspace.complex_images import (
    ChannelsToComplex,
    ChannelsToComplexd,
    ComplexToChannels,
    ComplexToChannelsd,
    ImageMagnitude,
    ImageMagnituded,
    StandardizeImage,
    StandardizeImaged,
    UnstandardizeImage,
    UnstandardizeImaged,
)
from monai_deqkan.transforms.kspace.crops import (
    CropCoilImages,
    CropCoilImagesd,
    CropKspace,
    CropKspaced,
    recon_shape,
)
from monai_deqkan.transforms.kspace.dictionary import (
    EstimateSensitivityMapsd,
    LoadKspaceSliced,
    MaskKspaced,
    NormalizeKspaced,
    ReferenceImaged,
    UndersampleKspaced,
)
from monai_deqkan.transforms.kspace.header import KspaceHeader, read_kspace_header
from monai_deqkan.transforms.kspace.simulate import SimulateKspace, SimulateKspaced

__all__ = [
    "ChannelsToComplex",
    "ChannelsToComplexd",
    "ComplexToChannels",
    "ComplexToChannelsd",
    "CropCoilImages",
    "CropCoilImagesd",
    "CropKspace",
    "CropKspaced",
    "EstimateSensitivityMaps",
    "EstimateSensitivityMapsd",
    "ImageMagnitude",
    "ImageMagnituded",
    "KspaceHeader",
    "LoadKspaceSlice",
    "LoadKspaceSliced",
    "MaskKspace",
    "MaskKspaced",
    "NormalizeKspace",
    "NormalizeKspaced",
    "ReferenceImage",
    "ReferenceImaged",
    "SimulateKspace",
    "SimulateKspaced",
    "StandardizeImage",
    "StandardizeImaged",
    "UndersampleKspace",
    "UndersampleKspaced",
    "UnstandardizeImage",
    "UnstandardizeImaged",
    "kspace_file_shape",
    "read_kspace_header",
    "recon_shape",
]
