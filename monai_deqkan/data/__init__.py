"""Data sets: samples, folders, fastMRI files."""

from monai_deqkan.data.folders import (
    class_names,
    classification_items,
    hold_out,
    image_files,
    mask_values,
    segmentation_items,
)

__all__ = [
    "class_names",
    "classification_items",
    "hold_out",
    "image_files",
    "mask_values",
    "segmentation_items",
]
