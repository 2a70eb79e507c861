"""Read the archives of MedMNIST (.npz) image by image: a large one needs no more memory than a small one."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from monai_deqkan.data.parts import PARTS

_MAX_CLASSES = 10_000
_LAYOUT = "Expected are MedMNIST's arrays train_images, train_labels, and the same for val and test."


def medmnist_parts(archive: Path) -> list[str]:
    """Return the parts of an archive that have images and labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no archive of that kind.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"There is no archive {archive}. Check the path.")
    if not zipfile.is_zipfile(archive):
        raise ValueError(f"{archive} is no .npz archive, or it is damaged. {_LAYOUT}")
    with zipfile.ZipFile(archive) as file:
        names = {name.removesuffix(".npy") for name in file.namelist()}
    parts = [part for part in PARTS if {f"{part}_images", f"{part}_labels"} <= names]
    if "train" not in parts:
        raise ValueError(f"{archive} must hold train_images and train_labels; it holds {sorted(names)}. {_LAYOUT}")
    return parts


def medmnist_labels(archive: Path, part: str) -> list[int]:
    """Return the class numbers of a part.

    Raises:
        ValueError: if there are several per image, or they are no numbers from 0.
    """
    with np.load(archive, allow_pickle=False) as file:
        labels = np.asarray(file[f"{part}_labels"])
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            f"{part}_labels in {archive} must have one class per image; got shape {labels.shape}. Several findings per "
            "image, as in ChestMNIST, do not fit folders per class."
        )
    if not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
        raise ValueError(f"{part}_labels in {archive} must be class numbers from 0; got {labels.dtype}.")
    return [int(label) for label in labels]


def medmnist_shape(archive: Path, part: str) -> tuple[int, ...]:
    """Return the shape of a part's images: ``(N, H, W)``, ``(N, H, W, 3)``, or of volumes ``(N, D, H, W)``.

    Raises:
        ValueError: if they have another shape or type.
    """
    with zipfile.ZipFile(archive) as file, file.open(f"{part}_images.npy") as stream:
        return _read_header(archive, part, stream)


def medmnist_images(archive: Path, part: str) -> Iterator[NDArray[Any]]:
    """Give the images of a part one by one, 8-bit.

    Raises:
        ValueError: if they have another shape or type than ``medmnist_shape`` knows, or the file is cut off.
    """
    with zipfile.ZipFile(archive) as file, file.open(f"{part}_images.npy") as stream:
        count, *shape = _read_header(archive, part, stream)
        size = math.prod(shape)
        for index in range(count):
            data = stream.read(size)
            if len(data) < size:
                raise ValueError(f"{part}_images in {archive} end after {index} of {count}. The file is cut off.")
            yield np.frombuffer(data, np.uint8).reshape(shape)


def medmnist_class_names(labels: Sequence[int], names: Sequence[str] | None) -> list[str]:
    """Return a name per class number: those given, else the numbers, padded so that they sort rightly.

    Raises:
        ValueError: if fewer names than classes are given, or a class number is too large to be one.

    Example:
        >>> medmnist_class_names([0, 1, 10], None)[:2], medmnist_class_names([0, 1], ["no", "yes"])
        (['00', '01'], ['no', 'yes'])
    """
    count = max(labels, default=-1) + 1
    if count > _MAX_CLASSES:
        raise ValueError(f"Class numbers must lie below {_MAX_CLASSES}; got {count - 1}. Number the classes from 0.")
    if names is None:
        return [f"{label:0{len(str(count - 1))}d}" for label in range(count)]
    if len(names) < count:
        raise ValueError(f"`class_names` must name each of the {count} classes, in order; got {list(names)}.")
    return list(names)


def _read_header(archive: Path, part: str, stream: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype != np.uint8 or fortran or len(shape) not in (3, 4):
        raise ValueError(
            f"{part}_images in {archive} must be 8-bit, of shape (N, H, W), (N, H, W, 3) or (N, D, H, W), in C order; "
            f"got {dtype} of shape {shape}."
        )
    return tuple(int(size) for size in shape)
