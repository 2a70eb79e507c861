"""The images of a folder, or one image, that can be read; what cannot is named and left out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from monai_deqkan.data.folders import image_files
from monai_deqkan.transforms.image.array import LoadMedicalImage

__all__ = ["ReadableImages", "readable_images"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadableImages:
    """What :func:`readable_images` found.

    Attributes:
        root: the folder that the images lie below.
        items: ``{"image": path}`` of each image that can be read, sorted by path.
        skipped: ``{"file": path below root, "reason": ...}`` of each other.
    """

    root: Path
    items: list[dict[str, str]]
    skipped: list[dict[str, str]]


def readable_images(path: str | Path, channels: int = 1, spatial_dims: int = 2) -> ReadableImages:
    """Read each image below a folder, or a single one, once, and log a line for each that cannot be read.

    So that one damaged file does not end a run over thousands. Every file is read twice for it, which costs little
    beside a network.

    Args:
        path: a folder, or an image file: PNG, JPEG, BMP, TIFF, NIfTI, MetaImage, NRRD or DICOM.
        channels: number of channels wanted, see :class:`~monai_deqkan.transforms.LoadMedicalImage`.
        spatial_dims: 2 or 3.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if there is no image, or none can be read.
    """
    source = Path(path).expanduser()
    if not source.is_dir() and not source.is_file():
        raise FileNotFoundError(f"There is no image and no folder of images at {source}. Check the path.")
    root, files = (source, image_files(source)) if source.is_dir() else (source.parent, [source])
    load = LoadMedicalImage(spatial_dims, channels)
    items, skipped = [], []
    for file in files:
        try:
            load(file)
        except Exception as error:
            name = file.relative_to(root).as_posix()
            reason = " ".join(str(error).replace(str(file), file.name).split())
            skipped.append({"file": name, "reason": reason})
            logger.warning("Skipped %s: %s", name, reason)
        else:
            items.append({"image": str(file)})
    if not items:
        raise ValueError(f"None of {len(files)} image(s) at {source} can be read; the first: {skipped[0]['reason']}")
    return ReadableImages(root, items, skipped)
