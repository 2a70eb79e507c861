"""Transforms in MONAI's array and dictionary forms."""

from monai_deqkan.transforms import image, kspace
from monai_deqkan.transforms.image import *  # noqa: F403
from monai_deqkan.transforms.image import __all__ as _image
from monai_deqkan.transforms.kspace import *  # noqa: F403
from monai_deqkan.transforms.kspace import __all__ as _kspace

__all__ = ["image", "kspace", *_image, *_kspace]
