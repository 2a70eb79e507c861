"""The bundles that come with the package: their names, where they are, and copies of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from monai_deqkan._checks import check_choice, check_empty_folder

__all__ = ["bundle_folder", "bundle_metadata", "bundle_names", "copy_bundle"]

# What a bundle is; checkpoints, logs and results of runs in a checkout are not.
_PARTS = (
    "configs",
    "docs",
    "LICENSE",
    "models/model.pt",
    "models/model.json",
    "models/training_images.csv",
    "models/spread_calibration.json",
    "models/certified/model.pt",
    "models/certified/model.json",
)


def bundle_names() -> list[str]:
    """Return the names of the bundles that come with the package, sorted.

    Raises:
        FileNotFoundError: if the installation lacks them.
    """
    return sorted(path.parent.parent.name for path in _bundles().glob("*/configs/metadata.json"))


def bundle_folder(name: str) -> Path:
    """Return the folder of a bundle: inside the installed package, or in the checkout of an editable installation.

    Args:
        name: one of :func:`bundle_names`.

    Raises:
        ValueError: if there is no bundle of that name; the message lists the names and the likeliest one.
    """
    return _bundles() / check_choice("name", name, bundle_names())


def bundle_metadata(name: str) -> dict[str, Any]:
    """Return the content of a bundle's ``metadata.json``.

    Args:
        name: one of :func:`bundle_names`.
    """
    return json.loads((bundle_folder(name) / "configs" / "metadata.json").read_text(encoding="utf-8"))


def copy_bundle(name: str, folder: str | Path) -> Path:
    """Copy a bundle's configurations, documents, licence and weights; checkpoints and results of runs are left out.

    Args:
        name: one of :func:`bundle_names`.
        folder: what becomes the bundle: absent, or empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: if there is no bundle of that name.
        FileExistsError: if the folder holds something.
        NotADirectoryError: if it is a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     copy = copy_bundle("lung_xray_kanunet_segmentation", folder)
        ...     (copy / "configs" / "train.json").is_file()
        True
    """
    source = bundle_folder(name)
    target = check_empty_folder(folder, f"the bundle {name}").absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Copied beside the target first, so that an interrupted copy leaves no half bundle there.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        draft = Path(temporary) / "bundle"
        draft.mkdir()
        for part in _PARTS:
            if (source / part).is_dir():
                shutil.copytree(source / part, draft / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif (source / part).is_file():
                (draft / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / part, draft / part)
        if target.exists():
            target.rmdir()
        draft.rename(target)
    return target


def _bundles() -> Path:
    """Return the folder that holds the bundles: package data of a wheel, else that of the checkout."""
    package = Path(str(files("monai_deqkan")))
    for folder in (package / "bundles", package.parent / "bundles"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"This installation of monai-deqkan has no bundles beside {package}. Install it again.")
