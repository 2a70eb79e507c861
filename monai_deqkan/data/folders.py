"""Plain folder layouts of a user's data set, as lists of dictionaries for MONAI's data sets."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_deqkan._checks import check_folder
from monai_deqkan.data.decathlon import decathlon_labels, decathlon_parts, is_decathlon
from monai_deqkan.data.files import IMAGE_SUFFIXES, image_stem, images_in, is_image, visible, visible_folders
from monai_deqkan.data.parts import part_folders, resolve_part
from monai_deqkan.data.splits import hold_out, hold_out_patients, patients_of
from monai_deqkan.data.tables import ImageRow, read_image_table
from monai_deqkan.transforms.image.array import read_image

__all__ = [
    "class_names",
    "classification_items",
    "image_files",
    "mask_class_names",
    "mask_values",
    "segmentation_items",
]

logger = logging.getLogger(__name__)

_CLASS_LAYOUT = (
    "Expected layout: train/<class>/<image files>, and where you have them val/<class>/... and test/<class>/..."
)
_MASK_LAYOUT = "Expected layout: train/images/<name>.png with train/masks/<name>.png, likewise val/ and test/."
_MAX_VALUES = 64
_SMOOTHED = 16  # several values this near to 0, several this near to 255 and no others: smoothed edges, no classes


def image_files(folder: str | Path) -> list[Path]:
    """List all readable images below a folder, sorted: PNG, JPEG, BMP, TIFF, NIfTI, MetaImage, NRRD and DICOM.

    DICOM files are found by their content where they have no known suffix; hidden files are left out.

    Raises:
        ValueError: if there is none.
    """
    root = check_folder(folder, "the images")
    files = [file for file in visible(root.rglob("*"), root) if is_image(file)]
    if not files:
        raise ValueError(f"No image was found below {root}. Readable are {', '.join(IMAGE_SUFFIXES)} and DICOM files.")
    return files


def class_names(dataset_dir: str | Path) -> list[str]:
    """Return the class names of a classification data set: the sorted names of the folders in ``train``.

    Args:
        dataset_dir: the folder that holds ``train``, or a CSV file, see ``classification_items``.

    Raises:
        FileNotFoundError: if the data set or its ``train`` folder is missing.
        ValueError: if there are fewer than two classes.
    """
    return _train_classes(dataset_dir)


def classification_items(
    dataset_dir: str | Path,
    part: str,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    *,
    patients: str | Path | None = None,
) -> list[dict[str, Any]]:
    r"""List the images of ``train|val|test/<class>/*`` with their labels.

    Without ``val`` a fifth of each class in ``train`` is held out, by the seed. Where ``patients`` tells who is who,
    all images of a patient stay on one side, and each class comes as near to a fifth as that allows; where the data
    set has ``val`` or ``test``, a warning tells how many patients it shares with ``train``.

    Args:
        dataset_dir: the folder that holds ``train``, and perhaps ``val`` and ``test``; or a CSV file with columns
            ``file`` (absolute, or relative to the CSV's folder) and ``label``, and perhaps ``part`` and ``patient``.
        part: ``"train"``, ``"val"``, or ``"evaluate"`` for ``test`` where there is one, else ``val``.
        seed: seed of the held-out part.
        class_names: the classes in the order of their labels, as stored with a trained model; by default those of
            ``train``, sorted.
        patients: how to tell patients apart, as in ``patients_of``: a regular expression such as ``r"person(\d+)"``, or
            the path of a CSV file. By default the column ``patient`` of a data set that is itself a CSV file.

    Returns:
        ``{"image": path, "label": index of the class}`` for each image, sorted by label and path.

    Raises:
        FileNotFoundError: if the data set or its ``train`` folder is missing.
        ValueError: if a class is empty, the classes of two parts differ, or ``patients`` does not fit the files.
    """
    names = list(class_names) if class_names is not None else _train_classes(dataset_dir)
    present = _class_parts(dataset_dir)
    chosen, split = _resolve(dataset_dir, part, present, _CLASS_LAYOUT)
    found = _files_by_class(dataset_dir, chosen)
    if sorted(names) != sorted(found):
        raise ValueError(
            f"The classes of {chosen} in {dataset_dir} must be {sorted(names)}; got {sorted(found)} (missing "
            f"{sorted(set(names) - set(found))}, unknown {sorted(set(found) - set(names))}). {_CLASS_LAYOUT}"
        )
    for name in names:
        if len(found[name]) < (2 if split else 1):
            need = "at least 2 images where there is no val folder" if split else "at least one image"
            raise ValueError(
                f"The class folder {Path(dataset_dir) / chosen / name} must hold {need}; got {len(found[name])}. "
                f"{_CLASS_LAYOUT}"
            )
    files = {name: found[name] for name in names}
    if split:
        files = _hold_out_classes(dataset_dir, files, split, seed, patients)
        without = [name for name in names if not files[name]]
        if without:  # no area under the ROC curve could be computed, and so no model be chosen
            raise ValueError(
                f"The {split} side of {dataset_dir} would have no image of {', '.join(without)}: each class needs "
                "images of at least two patients. Add patients, or make a folder val."
            )
        _log_hold_out(dataset_dir, split, sum(map(len, files.values())))
    elif chosen != "train" and "train" in present:
        _warn_of_shared_patients(dataset_dir, chosen, patients)
    return [{"image": str(file), "label": label} for label, name in enumerate(names) for file in files[name]]


def segmentation_items(dataset_dir: str | Path, part: str, seed: int = 0) -> list[dict[str, str]]:
    """List the pairs of ``train|val|test/{images,masks}``: files of the same name but for the suffix.

    Or the cases of a folder in the Medical Segmentation Decathlon's layout: ``dataset.json`` with the lists
    ``training`` and perhaps ``validation``, beside ``imagesTr`` and ``labelsTr``; test cases have no labels there and
    count only where the list gives some. Without ``val`` a fifth of ``train`` is held out, by the seed.

    Args:
        dataset_dir: the folder that holds ``train``, and perhaps ``val`` and ``test``; or ``dataset.json``.
        part: ``"train"``, ``"val"``, or ``"evaluate"`` for ``test`` where there is one, else ``val``.
        seed: seed of the held-out part.

    Returns:
        ``{"image": path, "label": path}`` for each pair, sorted by name.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if an image has no mask, a mask no image, a name comes twice, or there is no pair.
    """
    root = check_folder(dataset_dir, "the data set")
    if is_decathlon(root):
        parts = decathlon_parts(root)
        chosen, split = _resolve(dataset_dir, part, parts, _MASK_LAYOUT)
        items = parts[chosen]
    else:
        folders = part_folders(root)
        chosen, split = _resolve(dataset_dir, part, folders, _MASK_LAYOUT)
        items = _pairs(folders[chosen])
    if split:
        items = hold_out(items, split, seed)
        _log_hold_out(dataset_dir, split, len(items))
    return items


def mask_values(dataset_dir: str | Path) -> list[int]:
    """Return the distinct pixel values of all training masks, sorted; the lowest is the background.

    A Decathlon's ``dataset.json`` tells them, so that no mask need be read.

    Raises:
        ValueError: if the values are no integers, only one, more than 64, or those of a lossy JPEG.
    """
    if is_decathlon(dataset_dir):
        return list(decathlon_labels(dataset_dir))
    values: set[int] = set()
    for item in _pairs(_part_folder(dataset_dir, "train", _MASK_LAYOUT)):
        mask = read_image(item["label"], is_mask=True)
        found = np.unique(mask.numpy())
        lossy = item["label"].lower().endswith((".jpg", ".jpeg")) and len(found) > 2
        low, high = np.abs(found) <= _SMOOTHED, np.abs(255 - found) <= _SMOOTHED
        smoothed = bool(np.all(low | high)) and len(found) > 4 and low.sum() > 1 and high.sum() > 1
        if lossy or smoothed or not np.all(found == np.round(found)):
            raise ValueError(
                f"Masks must hold one integer per class; {item['label']} holds {len(found)} distinct values such as "
                f"{', '.join(f'{value:g}' for value in found[:5])}. Threshold probabilities and smoothed "
                "edges, and save masks as PNG or NIfTI: JPEG changes the values."
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


def mask_class_names(values: Sequence[int], dataset_dir: str | Path | None = None) -> list[str]:
    """Name the classes of masks by their pixel values, where nobody gave better names.

    Args:
        values: the distinct pixel values, sorted.
        dataset_dir: the data set, whose ``dataset.json``, in the Decathlon's layout, gives better names.

    Example:
        >>> mask_class_names([0, 255]), mask_class_names([0, 85, 170])
        (['background', 'foreground'], ['background', 'value_85', 'value_170'])
    """
    if dataset_dir is not None and is_decathlon(dataset_dir):
        labels = decathlon_labels(dataset_dir)
        if list(labels) == list(values):
            return list(labels.values())
    foreground = [f"value_{value}" for value in values[1:]] if len(values) > 2 else ["foreground"]
    return ["background", *foreground]


def _is_table(dataset_dir: str | Path) -> bool:
    return str(dataset_dir).lower().endswith((".csv", ".tsv"))


def _table_rows(dataset_dir: str | Path, part: str) -> list[ImageRow]:
    """Return the rows of a part; all rows are train where the table tells no parts."""
    rows = read_image_table(Path(dataset_dir))
    return sorted((row for row in rows if (row.part or "train") == part), key=lambda row: row.file)


def _class_parts(dataset_dir: str | Path) -> list[str]:
    if _is_table(dataset_dir):
        return sorted({row.part or "train" for row in read_image_table(Path(dataset_dir))})
    return list(part_folders(check_folder(dataset_dir, "the data set")))


def _files_by_class(dataset_dir: str | Path, part: str) -> dict[str, list[Path]]:
    if _is_table(dataset_dir):
        found: dict[str, list[Path]] = defaultdict(list)
        for row in _table_rows(dataset_dir, part):
            found[row.label].append(row.file)
        return dict(found)
    return {folder.name: images_in(folder) for folder in visible_folders(part_folders(Path(dataset_dir))[part])}


def _train_classes(dataset_dir: str | Path) -> list[str]:
    if _is_table(dataset_dir):
        names = sorted({row.label for row in _table_rows(dataset_dir, "train")})
    else:
        names = [folder.name for folder in visible_folders(_part_folder(dataset_dir, "train", _CLASS_LAYOUT))]
    if len(names) < 2:
        raise ValueError(
            f"Classification takes at least 2 class folders for training in {dataset_dir}; got {len(names)}: {names}. "
            f"{_CLASS_LAYOUT}"
        )
    return names


def _patient_keys(dataset_dir: str | Path, files: Sequence[Path], patients: str | Path | None) -> list[str]:
    """Return who each file is of; empty where nobody told."""
    if patients is not None:
        return patients_of(files, patients)
    if not _is_table(dataset_dir):
        return []
    known = {row.file: row.patient for row in read_image_table(Path(dataset_dir))}
    return [known[file] or f"file:{file}" for file in files] if any(known.values()) else []


def _hold_out_classes(
    dataset_dir: str | Path, found: dict[str, list[Path]], split: str, seed: int, patients: str | Path | None
) -> dict[str, list[Path]]:
    """Return one side of a split of each class."""
    pairs = [(name, file) for name, files in found.items() for file in files]
    keys = _patient_keys(dataset_dir, [file for _, file in pairs], patients)
    if not keys:
        return {name: hold_out(files, split, seed) for name, files in found.items()}
    classes_of: dict[str, set[str]] = defaultdict(set)
    for key, (name, _) in zip(keys, pairs, strict=True):
        classes_of[key].add(name)
    several = sum(len(classes) > 1 for classes in classes_of.values())
    if split == "val":
        text = "%d patients in %s, %d of them with images of several classes; each stays on one side of the split."
        logger.info(text, len(classes_of), dataset_dir, several)
    kept = set(hold_out_patients(pairs, split, keys, [name for name, _ in pairs], seed))
    return {name: [file for file in files if (name, file) in kept] for name, files in found.items()}


def _warn_of_shared_patients(dataset_dir: str | Path, part: str, patients: str | Path | None) -> None:
    train, other = (
        [file for files in _files_by_class(dataset_dir, name).values() for file in files] for name in ("train", part)
    )
    keys = _patient_keys(dataset_dir, train + other, patients)
    shared = set(keys[: len(train)]) & set(keys[len(train) :])
    if shared:
        logger.warning(
            "%d patients have images in both train and %s of %s: scores on %s will be too good. Split by patient.",
            len(shared),
            part,
            dataset_dir,
            part,
        )


def _part_folder(dataset_dir: str | Path, part: str, layout: str) -> Path:
    folders = part_folders(check_folder(dataset_dir, "the data set"))
    if part not in folders:
        raise FileNotFoundError(f"The data set {dataset_dir} must hold a folder '{part}'; it has none. {layout}")
    return folders[part]


def _resolve(dataset_dir: str | Path, part: str, present: Collection[str], layout: str) -> tuple[str, str]:
    """Return the part to read, and which side of a held-out split of it is meant (empty: all of it)."""
    chosen, split = resolve_part(part, present)
    if chosen not in present:
        raise FileNotFoundError(f"The data set {dataset_dir} must hold a folder '{chosen}'; it has none. {layout}")
    return chosen, split


def _log_hold_out(dataset_dir: str | Path, split: str, count: int) -> None:
    # Said only where the held-out side is asked for, so that a training run says it once.
    if split == "val":
        logger.info("No folder 'val' in %s: %d items of 'train' are held out for validation.", dataset_dir, count)


def _pairs(folder: Path) -> list[dict[str, str]]:
    """Return the image and mask files of one part, matched by name."""
    stems: dict[str, dict[str, Path]] = {}
    for kind in ("images", "masks"):
        if not (folder / kind).is_dir():
            raise FileNotFoundError(f"The folder {folder} must hold a folder '{kind}'; it has none. {_MASK_LAYOUT}")
        files = images_in(folder / kind)
        names = [image_stem(file) for file in files]
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
