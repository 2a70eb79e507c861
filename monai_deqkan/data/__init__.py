"""Data sets: samples, folders, fastMRI files; and the bundles that come with the package."""

from monai_deqkan.data.bundles import bundle_folder, bundle_metadata, bundle_names, copy_bundle
from monai_deqkan.data.check import check_dataset
from monai_deqkan.data.convert import convert_dataset
from monai_deqkan.data.data_report import DataReport, FilePair, Finding
from monai_deqkan.data.fastmri import find_kspace_files, kspace_items, kspace_slices, parse_slices, write_kspace
from monai_deqkan.data.folders import (
    class_names,
    classification_items,
    image_files,
    mask_class_names,
    mask_values,
    segmentation_items,
)
from monai_deqkan.data.kspace_index import KspaceFile, describe_kspace_files
from monai_deqkan.data.multislice import KspaceSliceDataset, collate_kspace
from monai_deqkan.data.readable import ReadableImages, readable_images
from monai_deqkan.data.reconstruction_items import reconstruction_items, source_weights
from monai_deqkan.data.samples import SAMPLES, write_sample
from monai_deqkan.data.simulate import simulate_kspace_folder
from monai_deqkan.data.splits import hold_out, hold_out_patients, patients_of
from monai_deqkan.data.tables import TableColumns

__all__ = [
    "SAMPLES",
    "DataReport",
    "FilePair",
    "Finding",
    "KspaceFile",
    "KspaceSliceDataset",
    "ReadableImages",
    "TableColumns",
    "bundle_folder",
    "bundle_metadata",
    "bundle_names",
    "check_dataset",
    "class_names",
    "classification_items",
    "collate_kspace",
    "convert_dataset",
    "copy_bundle",
    "describe_kspace_files",
    "find_kspace_files",
    "hold_out",
    "hold_out_patients",
    "image_files",
    "kspace_items",
    "kspace_slices",
    "mask_class_names",
    "mask_values",
    "parse_slices",
    "patients_of",
    "readable_images",
    "reconstruction_items",
    "segmentation_items",
    "simulate_kspace_folder",
    "source_weights",
    "write_kspace",
    "write_sample",
]
