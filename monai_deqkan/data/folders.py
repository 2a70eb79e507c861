"""Plain folder layouts of a user's data set, as lists of dictionaries for MONAI's data sets."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydicom.misc import is_dicom

from monai_deqkan._checks import check_choice, check_folder, check_int, check_range
from monai_deqkan.transforms.image.array import read_image

__all__ = [
    "class_names",
    "classification_items",
    "hold_out",
    "image_files",
    "mask_class_names",
    "mask_values",
    "segmentation_items",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".mha", ".nrrd")
_PARTS = ("train", "val", "evaluate")
_CLASS_LAYOUT = (
    "Expected layout: train/<class>/<image files>, and where you have them val/<class>/... and test/<class>/..."
)
_MASK_LAYOUT = "Expected layout: train/images/<name>.png with train/masks/<name>.png, likewise val/ and test/."
_MAX_VALUES = 64


def hold_out(items: Sequence[T], part: str, seed: int = 0, fraction: float = 0.2) -> list[T]:
    """Split a list by chance but repeatably, and return one side in the list's own order.

    Args:
        items: at least two items.
        part: ``"val"`` for the held-out share, ``"train"`` for the rest.
        seed: the same seed gives the same split.
        fraction: share held out, in ``(0, 1)``; each side gets at least one item.

    Raises:
        ValueError: if there are fewer than two items, or an argument lies outside its range.

    Example:
        >>> hold_out(["a", "b", "c", "d", "e"], "val"), hold_out(["a", "b", "c", "d", "e"], "train")
        (['d'], ['a', 'b', 'c', 'e'])
    """
    check_choice("part", part, ("train", "val"))
    check_int("seed", seed, minimum=0)
    check_range("fraction", fraction, 0, 1, open_low=True, open_high=True)
    if len(items) < 2:
        raise ValueError(f"Holding out a part for validation takes at least 2 items; got {len(items)}. Add data.")
    count = min(max(round(fraction * len(items)), 1), len(items) - 1)
    held_out = set(random.Random(seed).sample(range(len(items)), count))
    return [item for index, item in enumerate(items) if (index in held_out) == (part == "val")]


def image_files(folder: str | Path) -> list[Path]:
    """List all readable images below a folder, sorted: PNG, JPEG, BMP, TIFF, NIfTI, MetaImage, NRRD and DICOM.

    DICOM files are found by their content where they have no known suffix; hidden files are left out.

    Raises:
        ValueError: if there is none.
    """
    root = check_folder(folder, "the images")
    files = [file for file in _visible(root.rglob("*"), root) if _is_image(file)]
    if not files:
        raise ValueError(f"No image was found below {root}. Readable are {', '.join(_SUFFIXES)} and DICOM files.")
    return files


def class_names(dataset_dir: str | Path) -> list[str]:
    """Return the class names of a classification data set: the sorted names of the folders in ``train``.

    Raises:
        FileNotFoundError: if the data set or its ``train`` folder is missing.
        ValueError: if there are fewer than two classes.
    """
    return _train_classes(dataset_dir)


def classification_items(
    dataset_dir: str | Path, part: str, seed: int = 0, class_names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """List the images of ``train|val|test/<class>/*`` with their labels.

    Without ``val`` a fifth of each class in ``train`` is held out, by the seed.

    Args:
        dataset_dir: the folder that holds ``train``, and perhaps ``val`` and ``test``.
        part: ``"train"``, ``"val"``, or ``"evaluate"`` for ``test`` where there is one, else ``val``.
        seed: seed of the held-out part.
        class_names: the classes in the order of their labels, as stored with a trained model; by default those of
            ``train``, sorted.

    Returns:
        ``{"image": path, "label": index of the class}`` for each image, sorted by label and path.

    Raises:
        FileNotFoundError: if the data set or its ``train`` folder is missing.
        ValueError: if a class is empty, or the classes of two folders differ.
    """
    names = list(class_names) if class_names is not None else _train_classes(dataset_dir)
    folder, split = _resolve(dataset_dir, part, _CLASS_LAYOUT)
    found = _class_folders(folder)
    if sorted(names) != found:
        raise ValueError(
            f"The classes in {folder} must be {sorted(names)}; got {found} "
            f"(missing {sorted(set(names) - set(found))}, unknown {sorted(set(found) - set(names))}). {_CLASS_LAYOUT}"
        )
    items: list[dict[str, Any]] = []
    for label, name in enumerate(names):
        files = [file for file in _visible((folder / name).iterdir(), folder) if _is_image(file)]
        if len(files) < (2 if split else 1):
            need = "at least 2 images where there is no val folder" if split else "at least one image"
            raise ValueError(f"The class folder {folder / name} must hold {need}; got {len(files)}. {_CLASS_LAYOUT}")
        chosen = hold_out(files, split, seed) if split else files
        items += [{"image": str(file), "label": label} for file in chosen]
    _log_hold_out(folder, split, len(items))
    return items


def segmentation_items(dataset_dir: str | Path, part: str, seed: int = 0) -> list[dict[str, str]]:
    """List the pairs of ``train|val|test/{images,masks}``: files of the same name but for the suffix.

    Without ``val`` a fifth of ``train`` is held out, by the seed.

    Args:
        dataset_dir: the folder that holds ``train``, and perhaps ``val`` and ``test``.
        part: ``"train"``, ``"val"``, or ``"evaluate"`` for ``test`` where there is one, else ``val``.
        seed: seed of the held-out part.

    Returns:
        ``{"image": path, "label": path}`` for each pair, sorted by name.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if an image has no mask, a mask no image, a name comes twice, or there is no pair.
    """
    folder, split = _resolve(dataset_dir, part, _MASK_LAYOUT)
    items = _pairs(folder)
    if split:
        items = hold_out(items, split, seed)
        _log_hold_out(folder, split, len(items))
    return items


def mask_values(dataset_dir: str | Path) -> list[int]:
    """Return the distinct pixel values of all training masks, sorted; the lowest is the background.

    Raises:
        ValueError: if the values are no integers, only one, more than 64, or those of a lossy JPEG.
    """
    values: set[int] = set()
    for item in _pairs(_part_folder(dataset_dir, "train", _MASK_LAYOUT)):
        mask = read_image(item["label"], is_mask=True)
        found = np.unique(mask.numpy())
        lossy = item["label"].lower().endswith((".jpg", ".jpeg")) and len(found) > 2
        if lossy or not np.all(found == np.round(found)):
            raise ValueError(
                f"Masks must hold one integer per class; {item['label']} holds {len(found)} distinct values such as "
                f"{', '.join(f'{value:g}' for value in found[:5])}. Threshold probabilities, and save masks as PNG or "
                "NIfTI: JPEG changes the values."
            )
        values |= {int(value) for value in found}
        if len(values) > _MAX_VALUES:
            raise ValueError(
                f"Masks must hold at most {_MAX_VALUES} distinct values, one per class; there are more up to "
                f"{item['label']}. Threshold probabilities, and save masks as PNG or NIfTI, not as photographs."
            )
    if len(values) < 2:
        raise ValueError(
            f"The training masks in {dataset_dir} must hold at least two values, background and foreground; all are "
            f"{sorted(values)}. Check that the masks are not empty."
        )
    return sorted(values)


def mask_class_names(values: Sequence[int]) -> list[str]:
    """Name the classes of masks by their pixel values, where nobody gave better names.

    Example:
        >>> mask_class_names([0, 255]), mask_class_names([0, 85, 170])
        (['background', 'foreground'], ['background', 'value_85', 'value_170'])
    """
    foreground = [f"value_{value}" for value in values[1:]] if len(values) > 2 else ["foreground"]
    return ["background", *foreground]


def _visible(paths: Iterable[Path], root: Path) -> list[Path]:
    return sorted(
        path for path in paths if not any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
    )


def _suffix(path: Path) -> str:
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), "")


def _is_image(path: Path) -> bool:
    return path.is_file() and (_suffix(path) != "" or is_dicom(path))


def _class_folders(folder: Path) -> list[str]:
    return [path.name for path in _visible(folder.iterdir(), folder) if path.is_dir()]


def _train_classes(dataset_dir: str | Path) -> list[str]:
    folder = _part_folder(dataset_dir, "train", _CLASS_LAYOUT)
    names = _class_folders(folder)
    if len(names) < 2:
        raise ValueError(
            f"Classification takes at least 2 class folders in {folder}; got {len(names)}: {names}. {_CLASS_LAYOUT}"
        )
    return names


def _part_folder(dataset_dir: str | Path, part: str, layout: str) -> Path:
    root = check_folder(dataset_dir, "the data set")
    if not (root / part).is_dir():
        raise FileNotFoundError(f"The data set {root} must hold a folder '{part}'; it has none. {layout}")
    return root / part


def _resolve(dataset_dir: str | Path, part: str, layout: str) -> tuple[Path, str]:
    """Return the folder of a part, and which side of a held-out split of it is meant (empty: all of it)."""
    check_choice("part", part, _PARTS)
    root = check_folder(dataset_dir, "the data set")
    if part == "evaluate":
        part = "test" if (root / "test").is_dir() else "val"
    if part == "test" or (part == "val" and (root / "val").is_dir()):
        return root / part, ""
    return _part_folder(root, "train", layout), "" if (root / "val").is_dir() else part


def _log_hold_out(folder: Path, split: str, count: int) -> None:
    # Said only where the held-out side is asked for, so that a training run says it once.
    if split == "val":
        logger.info("No folder 'val' in %s: %d items of 'train' are held out for validation.", folder.parent, count)


def _pairs(folder: Path) -> list[dict[str, str]]:
    """Return the image and mask files of one part, matched by name."""
    stems: dict[str, dict[str, Path]] = {}
    for kind in ("images", "masks"):
        if not (folder / kind).is_dir():
            raise FileNotFoundError(f"The folder {folder} must hold a folder '{kind}'; it has none. {_MASK_LAYOUT}")
        files = [file for file in _visible((folder / kind).iterdir(), folder) if _is_image(file)]
        names = [file.name.removesuffix(file.name[len(file.name) - len(_suffix(file)) :]) for file in files]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        _refuse(twice, f"{folder / kind}: each name may come once, whatever its suffix;", "come twice")
        stems[kind] = dict(zip(names, files, strict=True))
    images, masks = stems["images"], stems["masks"]
    _refuse(sorted(set(images) - set(masks)), f"{folder}: each image must have a mask of the same name;", "have none")
    _refuse(sorted(set(masks) - set(images)), f"{folder}: each mask must have an image of the same name;", "have none")
    if not images:
        raise ValueError(f"The folder {folder} must hold at least one image with its mask; got none. {_MASK_LAYOUT}")
    return [{"image": str(images[name]), "label": str(masks[name])} for name in sorted(images)]


def _refuse(names: list[str], rule: str, verdict: str) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{rule} {', '.join(names[:5])}{more} {verdict}. {_MASK_LAYOUT}")
