"""Image and mask readers in MONAI's array and dictionary forms."""

from monai_deqkan.transforms.image.array import LoadMask, LoadMedicalImage
from monai_deqkan.transforms.image.border import RandBorderShade, RandBorderShaded
from monai_deqkan.transforms.image.dictionary import LoadMaskd, LoadMedicalImaged
from monai_deqkan.transforms.image.save import CheckSameShaped, SaveMask, SaveMaskd, SaveProbability, SaveProbabilityd
from monai_deqkan.transforms.image.smooth_inverse import SmoothInversed

__all__ = [
    "CheckSameShaped",
    "LoadMask",
    "LoadMaskd",
    "LoadMedicalImage",
    "LoadMedicalImaged",
    "RandBorderShade",
    "RandBorderShaded",
    "SaveMask",
    "SaveMaskd",
    "SaveProbability",
    "SaveProbabilityd",
    "SmoothInversed",
]
