"""Which files below a folder are images, what they are called without their suffix, and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pydicom.misc import is_dicom

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".mha", ".nrrd")
_BLOCK = 1 << 20  # bytes read at once


def visible(paths: Iterable[Path], root: Path) -> list[Path]:
    """Return the paths below ``root`` that are not hidden and lie in no hidden folder, sorted."""
    return sorted(
        path for path in paths if not any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
    )


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders directly in ``folder`` that are not hidden, sorted."""
    return [path for path in visible(folder.iterdir(), folder) if path.is_dir()]


def image_suffix(path: Path) -> str:
    """Return the suffix by which a file is known as an image; empty where there is none."""
    return next((suffix for suffix in IMAGE_SUFFIXES if path.name.lower().endswith(suffix)), "")


def image_stem(path: Path) -> str:
    """Return a file's name without the suffix of its image format.

    Example:
        >>> image_stem(Path("scans/b.1.nii.gz")), image_stem(Path("IM-0001.0002"))
        ('b.1', 'IM-0001.0002')
    """
    return path.name[: len(path.name) - len(image_suffix(path))]


def is_image(path: Path) -> bool:
    """Return whether a file is an image by its suffix, or a DICOM file by its content."""
    return path.is_file() and (image_suffix(path) != "" or is_dicom(path))


def images_in(folder: Path) -> list[Path]:
    """Return the visible images directly in a folder, sorted."""
    return [path for path in visible(folder.iterdir(), folder) if is_image(path)]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
