"""Turn common public layouts of classification data into ``train|val|test/<class>/*``, with a manifest."""

from __future__ import annotations

import csv
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from monai_deqkan._checks import check_empty_folder, check_folder, check_range
from monai_deqkan.data.files import file_sha256, is_image, visible, visible_folders
from monai_deqkan.data.medmnist import (
    medmnist_class_names,
    medmnist_images,
    medmnist_labels,
    medmnist_parts,
    medmnist_shape,
)
from monai_deqkan.data.parts import PARTS, part_folders
from monai_deqkan.data.splits import hold_out, hold_out_patients, patients_of
from monai_deqkan.data.tables import TableColumns, read_image_table

__all__ = ["convert_dataset"]

MANIFEST = "manifest.csv"
_MANIFEST_COLUMNS = ("source", "target", "label", "part", "sha256")


@dataclass(frozen=True)
class _Item:
    """One image to write: where it comes from, its class and part, and how to write it to a path."""

    source: str
    name: str
    label: str
    write: Callable[[Path], None]
    file: Path | None = None
    part: str = ""
    patient: str = ""


def convert_dataset(
    source: str | Path,
    folder: str | Path,
    *,
    columns: TableColumns | None = None,
    images_dir: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    patients: str | Path | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    link: bool = False,
    progress: bool | None = None,
) -> Path:
    r"""Turn a data set of a common public layout into ``train|val|test/<class>/*``.

    Files are copied unchanged. Where the source tells parts (folders such as ``Training``, a column, or MedMNIST's
    arrays), they are kept as they are; else they are drawn by the seed, each class by its share, and all images of a
    patient in one part where patients are told. ``manifest.csv`` lists source, target, label, part and SHA-256 of every
    file. Nothing is overwritten, and an interrupted run leaves nothing behind.

    Args:
        source: a folder with a folder per class, or with such folders in ``train``, ``val``, ``test`` (or ``Training``,
            ``valid``, ...); a CSV file (comma, semicolon or tab) with paths and labels; or MedMNIST's archive (.npz),
            whose pictures become PNG and whose volumes NIfTI (axes as they are, 1 mm).
        folder: absent, or empty.
        columns: the columns of the CSV file, where they have unusual names.
        images_dir: what paths in the CSV file are relative to; by default its folder.
        class_names: names of MedMNIST's classes, in the order of its numbers; by default the numbers.
        patients: how to tell patients apart, see ``patients_of``; by default the CSV file's column, where it has one.
        val_fraction: share of the images for ``val``, in ``[0, 1)``, where the source tells no parts.
        test_fraction: likewise for ``test``; together less than one.
        seed: seed of the parts.
        link: make symbolic links to the source's files in place of copies.
        progress: show a bar; None shows it on a terminal.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if the source, or an image that it lists, is missing.
        FileExistsError: if the folder holds something.
        ValueError: if the source has another layout, fewer than two classes, or options do not fit it; or if its parts
            share patients.
    """
    origin = Path(source).expanduser()
    _check_fractions(val_fraction, test_fraction)
    target = check_empty_folder(folder, "the converted data set").absolute()
    items = _items(origin, columns, images_dir, class_names, link)
    items = _with_patients(items, patients)
    items = _checked_parts(items) if items[0].part else _drawn_parts(items, val_fraction, test_fraction, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed at the end, so that an interrupted run leaves no half data set there.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        draft = Path(temporary) / "dataset"
        _write(items, draft, progress)
        if target.exists():
            target.rmdir()
        draft.rename(target)
    return target


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    check_range("val_fraction", val_fraction, 0, 1, open_high=True)
    check_range("test_fraction", test_fraction, 0, 1, open_high=True)
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            f"`val_fraction` and `test_fraction` must leave something for training; got {val_fraction} and "
            f"{test_fraction}."
        )


def _items(
    origin: Path,
    columns: TableColumns | None,
    images_dir: str | Path | None,
    class_names: Sequence[str] | None,
    link: bool,
) -> list[_Item]:
    kind = "folder" if origin.is_dir() else origin.suffix.lower()
    is_table, is_archive = kind in (".csv", ".tsv"), kind == ".npz"
    for option, given, fits in (
        ("columns", columns is not None, is_table),
        ("images_dir", images_dir is not None, is_table),
        ("class_names", class_names is not None, is_archive),
        ("link", link, not is_archive),
    ):
        if given and not fits:
            use = {"class_names": "a MedMNIST archive", "link": "files"}.get(option, "a CSV file")
            raise ValueError(f"`{option}` is for {use}; the source is {origin}. Leave it out.")
    if is_table:
        root = None if images_dir is None else check_folder(images_dir, "the images")
        rows = read_image_table(origin, columns or TableColumns(), root)
        items = [
            _file_item(row.file, root or origin.parent, row.label, row.part, row.patient, link=link) for row in rows
        ]
    elif is_archive:
        items = list(_archive_items(origin, class_names))
    else:
        items = list(_folder_items(check_folder(origin, "the data set to convert"), link))
    labels = sorted({item.label for item in items})
    if len(labels) < 2 or labels == ["images", "masks"]:
        raise ValueError(
            f"The source {origin} must have images of at least 2 classes; got {labels}. Expected: a folder per class, "
            "a CSV file with paths and labels, or a MedMNIST archive. Images with masks need no conversion."
        )
    return items


def _file_item(file: Path, root: Path, label: str, part: str = "", patient: str = "", *, link: bool) -> _Item:
    def write(path: Path) -> None:
        if link:
            path.symlink_to(file.absolute())
        else:
            shutil.copy2(file, path)

    name = os.path.relpath(file, root) if file.is_relative_to(root) else file.name
    return _Item(name, name, label, write, file, part, patient)


def _folder_items(root: Path, link: bool) -> Iterator[_Item]:
    parts: dict[str, Path] = part_folders(root) or {"": root}
    for part, folder in parts.items():
        for class_folder in visible_folders(folder):
            # Some sets keep the images of a class in folders of their own: of a patient, of a magnification.
            files = [file for file in visible(class_folder.rglob("*"), class_folder) if is_image(file)]
            for file in files:
                item = _file_item(file, root, class_folder.name, part, link=link)
                yield replace(item, name=str(file.relative_to(class_folder)))


def _archive_items(archive: Path, class_names: Sequence[str] | None) -> Iterator[_Item]:
    labels = {part: medmnist_labels(archive, part) for part in medmnist_parts(archive)}
    names = medmnist_class_names([label for found in labels.values() for label in found], class_names)
    for part, found in labels.items():
        count, *shape = medmnist_shape(archive, part)
        if count != len(found):
            raise ValueError(f"{archive} has {count} images and {len(found)} labels in {part}; each image needs one.")
        images = medmnist_images(archive, part)

        def write(path: Path, images: Iterator[np.ndarray] = images) -> None:
            _write_array(next(images), path)

        for index, label in enumerate(found):
            name = f"{index:06d}" + (".nii.gz" if _is_volume(shape) else ".png")
            yield _Item(f"{archive.name}:{part}_images[{index}]", name, names[label], write, None, part)


def _is_volume(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[-1] != 3


def _write_array(image: np.ndarray, path: Path) -> None:
    if _is_volume(image.shape):
        nib.save(nib.Nifti1Image(image, np.eye(4)), path)
    else:
        Image.fromarray(image).save(path)


def _with_patients(items: list[_Item], patients: str | Path | None) -> list[_Item]:
    """Tell each item's patient; where only some are known, the others are a patient each."""
    if patients is not None:
        if items[0].file is None:
            raise ValueError("`patients` is for files; the images of a MedMNIST archive have no names. Leave it out.")
        keys = patients_of([item.file for item in items if item.file is not None], patients)
        return [replace(item, patient=key) for item, key in zip(items, keys, strict=True)]
    if not any(item.patient for item in items):
        return items
    return [item if item.patient else replace(item, patient=f"file:{item.source}") for item in items]


def _checked_parts(items: list[_Item]) -> list[_Item]:
    parts_of: dict[str, set[str]] = {}
    for item in items:
        if item.patient:
            parts_of.setdefault(item.patient, set()).add(item.part)
    shared = sum(len(parts) > 1 for parts in parts_of.values())
    if shared:
        raise ValueError(
            f"{shared} of {len(parts_of)} patients have images in several parts of the source, which makes scores too "
            "good. Have parts drawn by patient: take the column of parts out, or give one folder with all classes."
        )
    return items


def _drawn_parts(items: list[_Item], val_fraction: float, test_fraction: float, seed: int) -> list[_Item]:
    rest, done = items, []
    for part, share in (("test", test_fraction), ("val", val_fraction / (1 - test_fraction))):
        if share > 0:
            done += [replace(item, part=part) for item in _side(rest, "val", seed, share)]
            rest = _side(rest, "train", seed, share)
    return done + [replace(item, part="train") for item in rest]


def _side(items: list[_Item], side: str, seed: int, fraction: float) -> list[_Item]:
    if any(item.patient for item in items):
        patients, labels = [item.patient for item in items], [item.label for item in items]
        return hold_out_patients(items, side, patients, labels, seed, fraction)
    chosen: list[_Item] = []
    for label in sorted({item.label for item in items}):
        of_class = [item for item in items if item.label == label]
        if len(of_class) < 2:
            raise ValueError(f"The class {label} has too few images to draw parts from. Add some, or set a share to 0.")
        chosen += hold_out(of_class, side, seed, fraction)
    return chosen


def _write(items: list[_Item], draft: Path, progress: bool | None) -> None:
    folders = _folder_names({item.label for item in items})
    doubled = {key for key, count in Counter(_place(item) for item in items).items() if count > 1}
    order = sorted(items, key=lambda item: PARTS.index(item.part))  # stable: an archive is read in its own order
    rows, taken = [], set()
    for item in tqdm(order, desc="convert", unit="image", disable=None if progress is None else not progress):
        name = re.sub(r"[\\/]", "_", item.name) if _place(item) in doubled else Path(item.name).name
        path = Path(item.part, folders[item.label], re.sub(r"^(\.|__)", "image_", name))
        if path in taken:
            raise ValueError(f"Two images of the source would both become {path}; {item.source} is one. Rename a file.")
        taken.add(path)
        (draft / path).parent.mkdir(parents=True, exist_ok=True)
        item.write(draft / path)
        rows.append((item.source, path.as_posix(), item.label, item.part, file_sha256(draft / path)))
    # A file's name need not be UTF-8: what cannot be written so is written by its bytes.
    with (draft / MANIFEST).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([_MANIFEST_COLUMNS, *rows])


def _place(item: _Item) -> tuple[str, str, str]:
    """Return what must differ for files to keep their own names."""
    return item.part, item.label, Path(item.name).name


def _folder_names(labels: set[str]) -> dict[str, str]:
    """Return a folder for each class: its name, without what file systems or the data set's readers refuse."""
    names = {label: re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", label).strip(" ").strip("._") or "class" for label in labels}
    if len(set(names.values())) < len(names):
        raise ValueError(f"The classes {sorted(labels)} do not have different folder names. Rename some.")
    return names
