"""Data sets: samples, folders, fastMRI files; and the bundles that come with the package."""

from monai_deqkan.data.bundles import bundle_folder, bundle_metadata, bundle_names, copy_bundle
from monai_deqkan.data.fastmri import find_kspace_files, kspace_items, kspace_slices, write_kspace
from monai_deqkan.data.folders import (
    class_names,
    classification_items,
    image_files,
    mask_class_names,
    mask_values,
    segmentation_items,
)
from monai_deqkan.data.samples import SAMPLES, write_sample
from monai_deqkan.data.splits import hold_out, hold_out_patients, patients_of

__all__ = [
    "SAMPLES",
    "bundle_folder",
    "bundle_metadata",
    "bundle_names",
    "class_names",
    "classification_items",
    "copy_bundle",
    "find_kspace_files",
    "hold_out",
    "hold_out_patients",
    "image_files",
    "kspace_items",
    "kspace_slices",
    "mask_class_names",
    "mask_values",
    "patients_of",
    "segmentation_items",
    "write_kspace",
    "write_sample",
]
