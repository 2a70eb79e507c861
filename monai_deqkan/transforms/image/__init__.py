"""Image and mask readers in MONAI's array and dictionary forms."""

from monai_deqkan.transforms.image.array import LoadMask, LoadMedicalImage
from monai_deqkan.transforms.image.dictionary import LoadMaskd, LoadMedicalImaged

__all__ = ["LoadMask", "LoadMaskd", "LoadMedicalImage", "LoadMedicalImaged"]
