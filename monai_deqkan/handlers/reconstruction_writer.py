"""Reconstructions as fastMRI-style HDF5 or NIfTI volumes, with a table of how each slice's solve went."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray

from monai_deqkan._checks import check_choice
from monai_deqkan.handlers.iteration_recorder import IterationRecorder
from monai_deqkan.solvers import SolveStatus
from monai_deqkan.transforms import kspace_file_shape, read_kspace_header, recon_shape

__all__ = ["ReconstructionWriter"]

logger = logging.getLogger(__name__)

_NOTE = "Research only; not for clinical use."


class ReconstructionWriter:
    """Write ``<file>.h5`` with a data set ``reconstruction`` for each k-space file, and ``slices.csv``.

    ``reconstruction`` holds magnitudes ``(slices, H, W)``, float32, in the unit of the file's k-space; slices that were
    left out are missing from it, and the attribute ``slices`` lists those that are there. The fastMRI package's
    ``evaluate`` reads it. The table has one line per slice: file, slice, number of evaluations, relative residual and
    status of its solve. A volume is written as soon as its last slice is done; slices of one file must follow each
    other. Files of one name from several folders outside ``dataset_dir`` get numbers: ``a.h5``, ``a_2.h5``. Nothing is
    overwritten.

    A NIfTI volume has the axes (columns, rows, slices), and the pixel size of the file's ISMRMRD header; without one
    pixels of 1 mm, with a line in the log. Position and orientation are not in that header: the affine says what a
    picture with rows from front to back says, and nothing about the patient's. Nothing else of the header is written.

    Args:
        output_dir: folder to write into; made where absent.
        dataset_dir: folder that files were read from; folders below it are kept.
        formats: ``"h5"``, ``"nifti"``, or both.
        image_size: rows and columns to keep around the centre, -1 for all; ``"recon"``: those of the scanner's image,
            see :func:`recon_shape`, as fastMRI scores them. None keeps the image as it is.

    Raises:
        FileExistsError: in a run, if a file to be written is there already.
        ValueError: for another format or size; in a run, if slices of one file do not follow each other, or differ in
            size.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        dataset_dir: str | os.PathLike[str],
        formats: str | Sequence[str] = "h5",
        image_size: Sequence[int] | str | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.root = Path(dataset_dir).absolute()
        self.formats = (formats,) if isinstance(formats, str) else tuple(formats)
        for name in self.formats or ("",):
            check_choice("formats", name, ("h5", "nifti"))
        if isinstance(image_size, str):
            check_choice("image_size", image_size, ("recon",))
        elif image_size is not None and len(image_size) != 2:
            raise ValueError(f"`image_size` must be rows and columns, 'recon' or None; got {image_size!r}.")
        self.image_size = image_size
        self._recorder: IterationRecorder | None = None
        self._source = ""
        self._targets: dict[str, Path] = {}
        self._slices: list[tuple[int, NDArray[np.float32]]] = []
        self._pixel_scale = (1.0, 1.0)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred`` and whose batch has ``source``, ``slice`` and ``scale``."""
        self._recorder = IterationRecorder.of(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, lambda _: self._flush())

    @property
    def table(self) -> Path:
        """The path of the table."""
        return self.output_dir / "slices.csv"

    def _start(self, engine: Engine) -> None:
        self._source, self._targets, self._slices = "", {}, []
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.table.open("w", newline="") as file:
            csv.writer(file).writerow(["file", "slice", "evaluations", "relative_residual", "status"])

    def _collect(self, engine: Any) -> None:
        if self._recorder is None:
            return
        recorder = self._recorder.last
        evaluations, residual, status = recorder.evaluations(), recorder.relative_residual(), recorder.status()
        rows: list[list[Any]] = []
        for row, (sample, output) in enumerate(zip(engine.state.batch, engine.state.output, strict=True)):
            source, index = str(sample["source"]), int(sample["slice"])
            if source != self._source:
                self._flush()
                self._targets[source] = self._new_target(source)
                self._source = source
            magnitude = torch.linalg.vector_norm(torch.as_tensor(output["pred"]).detach().float(), dim=0)
            self._slices.append((index, (magnitude * float(sample["scale"])).cpu().numpy()))
            scale = [float(value) for value in sample.get("pixel_scale", (1.0, 1.0))]
            self._pixel_scale = (scale[0], scale[1])
            solve: list[Any] = ["", "", ""]
            if row < len(status):
                solve = [
                    int(evaluations[row]),
                    f"{float(residual[row]):.3e}",
                    SolveStatus(int(status[row])).name.lower(),
                ]
            target = self._targets[source]
            written = target if "h5" in self.formats else target.with_suffix(".nii.gz")
            rows.append([written.relative_to(self.output_dir).as_posix(), index, *solve])
        with self.table.open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def _flush(self) -> None:
        if not self._slices:
            return
        indices, images = zip(*sorted(self._slices, key=lambda item: item[0]), strict=True)
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"The slices of one file must have one size; those of {self._source} differ.")
        volume = self._cropped(np.stack(images).astype(np.float32))
        target = self._targets[self._source]
        target.parent.mkdir(parents=True, exist_ok=True)
        if "h5" in self.formats:
            with h5py.File(target, "x") as file:
                file.create_dataset("reconstruction", data=volume)
                file.attrs["slices"] = np.asarray(indices)
                file.attrs["note"] = f"monai-deqkan reconstruction. {_NOTE}"
                if self._is_simulated():
                    file.attrs["simulated"] = True
        if "nifti" in self.formats:
            nib.save(self._nifti(volume, indices), target.with_suffix(".nii.gz"))
        self._slices = []

    def _is_simulated(self) -> bool:
        try:
            with h5py.File(self._source, "r") as file:
                return bool(file.attrs.get("simulated", False))
        except OSError:  # the k-space came from elsewhere
            return False

    def _cropped(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.image_size is None:
            return volume
        sizes = recon_shape(self._source) if isinstance(self.image_size, str) else self.image_size
        for axis, size in enumerate(sizes, start=1):
            full = volume.shape[axis]
            if 0 < size < full:
                start = full // 2 - size // 2
                volume = np.take(volume, range(start, start + size), axis=axis)
        return volume

    def _nifti(self, volume: NDArray[np.float32], indices: Sequence[int]) -> nib.Nifti1Image:
        rows, columns, thickness = self._pixel_size()
        steps = set(np.diff(indices).tolist()) or {1}
        if len(steps) > 1:
            logger.warning("The slices of %s are not evenly spaced; its NIfTI volume shows them so.", self._source)
        # As MONAI reads pictures: columns run to the left, rows to the back.
        affine = np.diag([-columns, -rows, thickness * min(steps), 1.0])
        affine[2, 3] = thickness * indices[0]
        image = nib.Nifti1Image(np.transpose(volume, (2, 1, 0)), affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = _NOTE.encode()
        return image

    def _pixel_size(self) -> tuple[float, float, float]:
        """Return rows, columns and slices in mm, by the file that the slices come from."""
        size = None
        try:
            header = read_kspace_header(self._source)
            if header is not None:
                _, _, height, width = kspace_file_shape(self._source)
                size = header.pixel_size(height, width)
        except (OSError, ValueError) as error:
            logger.warning("The header of %s was not used: %s", self._source, error)
        if size is None:
            logger.warning("%s tells no pixel size: its NIfTI volume has pixels of 1 mm.", self._source)
            return 1.0, 1.0, 1.0
        return size[0] * self._pixel_scale[0], size[1] * self._pixel_scale[1], size[2]

    def _new_target(self, source: str) -> Path:
        if source in self._targets:
            raise ValueError(
                f"The slices of one file must follow each other; {source} came again after another file. Read the "
                "slices in order: no shuffling, one process."
            )
        target = first = self.output_dir / self._relative(source)
        number = 1
        while target in self._targets.values():
            number += 1
            target = first.with_name(f"{first.stem}_{number}{first.suffix}")
        for path in (target, target.with_suffix(".nii.gz")):
            if path.exists():
                raise FileExistsError(f"{path} exists and was not touched. Name a new `output_dir`, or move it away.")
        return target

    def _relative(self, source: str) -> Path:
        path = Path(source).absolute()
        return path.relative_to(self.root) if self.root in path.parents else Path(path.name)
