"""K-space files in fastMRI's HDF5 layout: lists of their slices, and writing them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_finite, check_folder, check_tensor
from monai_deqkan.data.folders import hold_out
from monai_deqkan.operators import FourierOperator
from monai_deqkan.transforms.kspace.array import kspace_file_shape

__all__ = ["find_kspace_files", "kspace_items", "kspace_slices", "write_kspace"]

logger = logging.getLogger(__name__)

_LAYOUT = (
    "Expected layout: train/*.h5, and where you have them val/*.h5 and test/*.h5 (or fastMRI's own multicoil_train, "
    "multicoil_val, multicoil_test, or singlecoil_...), each file with a complex data set 'kspace' of shape "
    "(slices, coils, H, W), or (slices, H, W) for a single coil."
)
# What the fastMRI package reads: sizes, and the range of the columns; padding is columns // 2 - center = 0 lines.
_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
<encodedSpace><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize></encodedSpace>
<reconSpace><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize></reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{center}</center>
</kspace_encoding_step_1></encodingLimits></encoding></ismrmrdHeader>"""
_UNDERSAMPLED = "it was measured undersampled, so it has no reference."


def kspace_items(
    dataset_dir: str | Path, part: str, *, slices: Sequence[int] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """List the slices of one part of a k-space data set.

    Without a ``val`` folder a fifth of ``train`` is held out for it: of the files, or of the slices of a single file.
    Unreadable files are left out with a line in the log; so are files that were measured undersampled (fastMRI's test
    files, known by their data set ``mask``), which have no reference.

    Args:
        dataset_dir: folder with ``train``, and possibly ``val`` and ``test``; or fastMRI's own ``multicoil_train`` etc.
        part: ``"train"``, ``"val"``, or ``"evaluate"``: ``test`` where there is one with references, else as ``"val"``.
        slices: indices of the slices to take from each file, those that it lacks left out; None takes all.
        seed: seed of the held-out part.

    Returns:
        One ``{"kspace": path, "slice": index}`` per slice, sorted.

    Raises:
        FileNotFoundError: if the data set's folder, or its ``train`` folder where it is needed, is missing.
        ValueError: if no file of the part is usable, or too little is left to hold something out.
    """
    check_choice("part", part, ("train", "val", "evaluate"))
    root = check_folder(dataset_dir, "the k-space data set")
    if part == "evaluate":
        test = _part_folder(root, "test")
        if test is not None and not all(_without_reference(file) == _UNDERSAMPLED for file in _listed(test)):
            logger.info("Evaluation uses the files in %s.", test)
            return kspace_slices(_usable(_listed(test), test, _without_reference), slices)
        logger.info("There is no test folder with references in %s: evaluation uses the validation part.", root)
    val = _part_folder(root, "val")
    if part != "train" and val is not None:
        return kspace_slices(_usable(_listed(val), val, _without_reference), slices)
    train = _part_folder(root, "train")
    if train is None:
        raise FileNotFoundError(f"There is no train folder in {root}. {_LAYOUT}")
    files = _usable(_listed(train), train, _without_reference)
    if val is not None:
        return kspace_slices(files, slices)
    side = "train" if part == "train" else "val"
    if len(files) > 1:
        kept = hold_out(files, side, seed=seed)
        logger.info("There is no val folder in %s: %d of %d train files are for %s.", root, len(kept), len(files), side)
        return kspace_slices(kept, slices)
    items = kspace_slices(files, slices)
    if len(items) < 2:
        raise ValueError(
            f"{train} holds one slice in all, of which nothing can be held out for validation. Add files, or a val "
            "folder."
        )
    kept_items = hold_out(items, side, seed=seed)
    logger.info(
        "There is no val folder in %s: %d of %d slices of its file are for %s.", root, len(kept_items), len(items), side
    )
    return kept_items


def find_kspace_files(folder: str | Path) -> list[Path]:
    """List all k-space files (``*.h5``) below a folder, sorted, measured undersampled or not.

    Hidden files are left out; so are, with a line in the log, those that are unreadable or hold no k-space, such as
    reconstructions.

    Raises:
        ValueError: if there is none.
    """
    root = check_folder(folder, "the k-space files")
    files = sorted(f for f in root.rglob("*.h5") if not any(p.startswith(".") for p in f.relative_to(root).parts))
    if not files:
        raise ValueError(f"There is no *.h5 file in {root} or below it. {_LAYOUT}")
    return _usable(files, root, _unreadable)


def kspace_slices(files: Sequence[str | Path], slices: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """List the slices of some files as items.

    Args:
        files: k-space files.
        slices: indices to take from each file, those that it lacks left out; None takes all.

    Returns:
        One ``{"kspace": path, "slice": index}`` per slice, in the order of the files.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file does not hold k-space, or no slice is left.
    """
    items = []
    for file in files:
        available = range(kspace_file_shape(file)[0])
        wanted = available if slices is None else sorted(set(slices) & set(available))
        items += [{"kspace": str(file), "slice": index} for index in wanted]
    if not items:
        raise ValueError(f"None of the {len(files)} k-space files has one of the slices {slices}.")
    return items


def write_kspace(
    path: str | Path,
    kspace: Tensor | np.ndarray,
    *,
    reference_rss: Tensor | np.ndarray | None = None,
    attrs: Mapping[str, str | float] | None = None,
) -> None:
    """Write fully sampled k-space in fastMRI's HDF5 layout.

    The data sets are ``kspace``, ``reconstruction_rss`` and ``ismrmrd_header``, which holds no more than the sizes that
    the fastMRI package asks for: all columns were measured. The attributes are ``max`` and ``norm`` (of the reference),
    ``acquisition`` and ``patient_id``.

    Args:
        path: file to make; its folder is made too.
        kspace: complex, shape ``(slices, K, H, W)``.
        reference_rss: root sum of squares, same unit, shape ``(slices, H, W)``; None computes it.
        attrs: further attributes, or others than the default ones (``acquisition`` and ``patient_id``: ``"unknown"``).

    Raises:
        FileExistsError: if the file exists.
        ValueError: if shapes or type do not fit, or values are not finite.
    """
    target = Path(path)
    data = check_tensor("kspace", torch.as_tensor(kspace))
    if data.ndim != 4 or not data.is_complex():
        raise ValueError(
            f"`kspace` must be complex of shape (slices, K, H, W); got {data.dtype} of shape {tuple(data.shape)}."
        )
    check_finite("kspace", data)
    if reference_rss is None:
        reference = FourierOperator(2).adjoint(data).abs().square().sum(dim=1).sqrt()
    else:
        reference = torch.as_tensor(reference_rss)
    if reference.shape != (data.shape[0], *data.shape[2:]):
        raise ValueError(
            f"`reference_rss` must have shape (slices, H, W) = {(data.shape[0], *data.shape[2:])}; got "
            f"{tuple(reference.shape)}."
        )
    if target.exists():
        raise FileExistsError(f"{target} exists and was not touched. Name another file, or move it away.")
    target.parent.mkdir(parents=True, exist_ok=True)
    image = reference.detach().cpu().numpy().astype(np.float32)
    defaults = {"max": float(image.max()), "norm": float(np.linalg.norm(image))}
    with h5py.File(target, "w") as file:
        file["kspace"] = data.detach().cpu().numpy().astype(np.complex64)
        file["reconstruction_rss"] = image
        file["ismrmrd_header"] = _header(*image.shape[1:])
        file.attrs.update({**defaults, "acquisition": "unknown", "patient_id": "unknown", **(attrs or {})})


def _header(rows: int, columns: int) -> str:
    return _HEADER.format(rows=rows, columns=columns, last=columns - 1, center=columns // 2)


def _part_folder(root: Path, part: str) -> Path | None:
    """Return the folder of a part, under its plain or one of fastMRI's names."""
    names = (part, f"multicoil_{part}", f"singlecoil_{part}")
    return next((root / name for name in names if (root / name).is_dir()), None)


def _listed(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.h5") if not file.name.startswith("."))


def _usable(files: Sequence[Path], folder: Path, problem_of: Callable[[Path], str]) -> list[Path]:
    """Return the files without a problem, and log the others."""
    usable = []
    for file in files:
        problem = problem_of(file)
        if problem:
            logger.warning("Left out %s: %s", file.relative_to(folder), problem)
        else:
            usable.append(file)
    if len(usable) < len(files):
        logger.warning("%d of %d files in %s were left out.", len(files) - len(usable), len(files), folder)
    if not usable:
        found = f"all {len(files)} *.h5 files are unusable" if files else "there is no *.h5 file"
        raise ValueError(f"No k-space in {folder}: {found}. {_LAYOUT}")
    return usable


def _unreadable(file: Path) -> str:
    try:
        kspace_file_shape(file)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _without_reference(file: Path) -> str:
    problem = _unreadable(file)
    if problem:
        return problem
    with h5py.File(file, "r") as content:
        return _UNDERSAMPLED if "mask" in content else ""
