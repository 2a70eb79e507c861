"""K-space files in fastMRI's HDF5 layout: lists of their slices, and writing them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_finite, check_folder, check_tensor
from monai_deqkan.data.kspace_index import KspaceFile, describe_kspace_files
from monai_deqkan.data.parts import resolve_part
from monai_deqkan.data.splits import hold_out
from monai_deqkan.operators import FourierOperator

__all__ = ["find_kspace_files", "kspace_items", "kspace_slices", "parse_slices", "write_kspace"]

logger = logging.getLogger(__name__)

Slices = Sequence[int] | int | str | None

_LAYOUT = (
    "Expected layout: train/*.h5, and where you have them val/*.h5 and test/*.h5 (or fastMRI's own multicoil_train, "
    "multicoil_val, multicoil_test, or singlecoil_...), each file with a complex data set 'kspace' of shape "
    "(slices, coils, H, W), or (slices, H, W) for a single coil."
)
_CHALLENGES = ("multicoil", "singlecoil")
# The fully sampled test files of the brain set come in a folder of their own; the knee set's second edition has "v2".
_TEST_ENDINGS = ("_full", "", "_v2")
# What the fastMRI package reads: sizes, and the range of the columns; padding is columns // 2 - center = 0 lines.
_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
<encodedSpace><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize>{fov}</encodedSpace>
<reconSpace><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize>{fov}</reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{center}</center>
</kspace_encoding_step_1></encodingLimits></encoding></ismrmrdHeader>"""
_FOV = "<fieldOfView_mm><x>{x}</x><y>{y}</y><z>{z}</z></fieldOfView_mm>"
_UNDERSAMPLED = "it was measured undersampled, so it has no reference."


def parse_slices(slices: Slices) -> list[int] | None:
    """Return slice indices, from 0: of one, a sequence, or a text such as ``"11-27"`` or ``"0-3,7"``, ends included.

    Raises:
        ValueError: if the text or an index is no such thing.

    Example:
        >>> parse_slices("0-2,7"), parse_slices(range(3)), parse_slices(4), parse_slices(None)
        ([0, 1, 2, 7], [0, 1, 2], [4], None)
    """
    if slices is None:
        return None
    wanted: list[int] = []
    if isinstance(slices, str):
        for part in slices.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError(f"`slices` must be indices, or a text such as '11-27' or '0-3,7'; got {slices!r}.")
            wanted += range(int(match[1]), int(match[2] or match[1]) + 1)
        return wanted
    wanted = [slices] if isinstance(slices, int) else list(slices)
    if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in wanted):
        raise ValueError(f"`slices` must be indices from 0, or a text such as '11-27'; got {slices!r}.")
    return wanted


def kspace_items(
    dataset_dir: str | Path,
    part: str,
    *,
    slices: Slices = None,
    seed: int = 0,
    challenge: str | None = None,
    index_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """List the slices of one part of a k-space data set.

    Without a ``val`` folder a fifth of ``train`` is held out for it: of the files, or of the slices of a single file.
    Unreadable files are left out with a line in the log; so are files that were measured undersampled (fastMRI's test
    files, known by their data set ``mask``), which have no reference.

    Args:
        dataset_dir: folder with ``train``, and possibly ``val`` and ``test``; or fastMRI's own ``multicoil_train``
            and so on, of the knee or the brain set.
        part: ``"train"``, ``"val"``, or ``"evaluate"``: ``test`` where there is one with references, else as ``"val"``.
        slices: indices of the slices to take from each file, or a text, see :func:`parse_slices`; those that a file
            lacks are left out. None takes all.
        seed: seed of the held-out part.
        challenge: ``"multicoil"`` or ``"singlecoil"`` takes fastMRI's folders of that name only; None takes plain
            names, else multicoil, else singlecoil.
        index_dir: where what the files hold is remembered, see :func:`describe_kspace_files`.

    Returns:
        One ``{"kspace": path, "slice": index}`` per slice, sorted.

    Raises:
        FileNotFoundError: if the data set's folder, or its ``train`` folder where it is needed, is missing.
        ValueError: if no file of the part is usable, or too little is left to hold something out.
    """
    check_choice("part", part, ("train", "val", "evaluate"))
    root = check_folder(dataset_dir, "the k-space data set")
    wanted = parse_slices(slices)
    folders = _part_folders(root, challenge)
    tested: list[KspaceFile] = []
    if part == "evaluate" and "test" in folders:
        tested = describe_kspace_files(_listed(folders["test"]), index_dir)
        if all(file.undersampled for file in tested):
            del folders["test"]
        else:
            logger.info("Evaluation uses the files in %s.", folders["test"])
            return _slices_of(_usable(tested, folders["test"], _without_reference), wanted)
    if part == "evaluate":
        logger.info("There is no test folder with references in %s: evaluation uses the validation part.", root)
    name, side = resolve_part(part, folders)
    if name not in folders:
        raise FileNotFoundError(f"There is no train folder in {root}. {_LAYOUT}")
    folder = folders[name]
    files = _usable(describe_kspace_files(_listed(folder), index_dir), folder, _without_reference)
    if not side:
        return _slices_of(files, wanted)
    if len(files) > 1:
        kept = hold_out(files, side, seed=seed)
        logger.info("There is no val folder in %s: %d of %d train files are for %s.", root, len(kept), len(files), side)
        return _slices_of(kept, wanted)
    items = _slices_of(files, wanted)
    if len(items) < 2:
        raise ValueError(
            f"{folder} holds one slice in all, of which nothing can be held out for validation. Add files, or a val "
            "folder."
        )
    kept_items = hold_out(items, side, seed=seed)
    logger.info(
        "There is no val folder in %s: %d of %d slices of its file are for %s.", root, len(kept_items), len(items), side
    )
    return kept_items


def find_kspace_files(folder: str | Path, index_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """List all k-space files (``*.h5``) below a folder, sorted, measured undersampled or not.

    Hidden files are left out; so are, with a line in the log, those that are unreadable or hold no k-space, such as
    reconstructions.

    Args:
        folder: where to look.
        index_dir: where what the files hold is remembered, see :func:`describe_kspace_files`.

    Raises:
        ValueError: if there is none.
    """
    root = check_folder(folder, "the k-space files")
    files = sorted(f for f in root.rglob("*.h5") if not any(p.startswith(".") for p in f.relative_to(root).parts))
    if not files:
        raise ValueError(f"There is no *.h5 file in {root} or below it. {_LAYOUT}")
    return [file.path for file in _usable(describe_kspace_files(files, index_dir), root, lambda file: file.problem)]


def kspace_slices(
    files: Sequence[str | Path], slices: Slices = None, index_dir: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """List the slices of some files as items.

    Args:
        files: k-space files.
        slices: indices to take from each file, or a text, see :func:`parse_slices`; those that a file lacks are left
            out. None takes all.
        index_dir: where what the files hold is remembered, see :func:`describe_kspace_files`.

    Returns:
        One ``{"kspace": path, "slice": index}`` per slice, in the order of the files.

    Raises:
        ValueError: if a file cannot be read or does not hold k-space, or no slice is left.
    """
    found = describe_kspace_files(files, index_dir)
    problems = [file.problem for file in found if file.problem]
    if problems:
        raise ValueError(f"{len(problems)} of {len(found)} k-space files cannot be used; the first: {problems[0]}")
    return _slices_of(found, parse_slices(slices))


def write_kspace(
    path: str | Path,
    kspace: Tensor | np.ndarray,
    *,
    reference_rss: Tensor | np.ndarray | None = None,
    pixel_size: Sequence[float] | None = None,
    attrs: Mapping[str, str | float | bool] | None = None,
) -> None:
    """Write fully sampled k-space in fastMRI's HDF5 layout.

    The data sets are ``kspace``, ``reconstruction_rss`` and ``ismrmrd_header``, which holds no more than the sizes that
    the fastMRI package asks for: all columns were measured. The attributes are ``max`` and ``norm`` (of the reference),
    ``acquisition`` and ``patient_id``.

    Args:
        path: file to make; its folder is made too.
        kspace: complex, shape ``(slices, K, H, W)``.
        reference_rss: root sum of squares, same unit, shape ``(slices, H, W)``; None computes it.
        pixel_size: rows, columns and slices, in mm, for the header's fields of view; None leaves them out.
        attrs: further attributes, or others than the default ones (``acquisition`` and ``patient_id``: ``"unknown"``).

    Raises:
        FileExistsError: if the file exists.
        ValueError: if shapes or type do not fit, or values are not finite.
    """
    target = Path(path)
    data = check_tensor("kspace", torch.as_tensor(kspace))
    if data.ndim != 4 or not data.is_complex():
        raise ValueError(
            f"`kspace` must be complex of shape (slices, K, H, W), K coils, 1 for single-coil data; got {data.dtype} "
            f"of shape {tuple(data.shape)}."
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
        file["ismrmrd_header"] = _header(image.shape[1], image.shape[2], pixel_size)
        file.attrs.update({**defaults, "acquisition": "unknown", "patient_id": "unknown", **(attrs or {})})


def _header(rows: int, columns: int, pixel_size: Sequence[float] | None) -> str:
    fov = ""
    if pixel_size is not None:
        if len(pixel_size) != 3 or min(pixel_size) <= 0:
            raise ValueError(f"`pixel_size` must be three positive numbers in mm; got {pixel_size!r}.")
        fov = _FOV.format(x=rows * pixel_size[0], y=columns * pixel_size[1], z=pixel_size[2])
    return _HEADER.format(rows=rows, columns=columns, fov=fov, last=columns - 1, center=columns // 2)


def _part_folders(root: Path, challenge: str | None) -> dict[str, Path]:
    """Return the folders of the parts that there are, under plain or fastMRI's names."""
    if challenge is not None:
        check_choice("challenge", challenge, _CHALLENGES)
    prefixes = [f"{name}_" for name in _CHALLENGES] if challenge is None else [f"{challenge}_"]
    found = {}
    for part in ("train", "val", "test"):
        endings = _TEST_ENDINGS if part == "test" else ("",)
        names = [part] if challenge is None else []
        names += [f"{prefix}{part}{ending}" for prefix in prefixes for ending in endings]
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is not None:
            found[part] = folder
    return found


def _listed(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.h5") if not file.name.startswith("."))


def _slices_of(files: Sequence[KspaceFile], wanted: Sequence[int] | None) -> list[dict[str, Any]]:
    items = []
    for file in files:
        available = range(file.shape[0] if file.shape else 0)
        indices = available if wanted is None else sorted(set(wanted) & set(available))
        items += [{"kspace": str(file.path), "slice": index} for index in indices]
    if not items:
        raise ValueError(f"None of the {len(files)} k-space files has one of the slices {wanted}.")
    return items


def _usable(files: Sequence[KspaceFile], folder: Path, problem_of: Callable[[KspaceFile], str]) -> list[KspaceFile]:
    """Return the files without a problem, and log the others."""
    usable = []
    for file in files:
        problem = problem_of(file)
        if problem:
            logger.warning("Left out %s: %s", file.path.relative_to(folder), problem)
        else:
            usable.append(file)
    if len(usable) < len(files):
        logger.warning("%d of %d files in %s were left out.", len(files) - len(usable), len(files), folder)
    if not usable:
        found = f"all {len(files)} *.h5 files are unusable" if files else "there is no *.h5 file"
        raise ValueError(f"No k-space in {folder}: {found}. {_LAYOUT}")
    return usable


def _without_reference(file: KspaceFile) -> str:
    return file.problem or (_UNDERSAMPLED if file.undersampled else "")
