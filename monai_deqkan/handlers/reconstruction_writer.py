"""Reconstructions as fastMRI-style HDF5 or NIfTI volumes and pictures, with a table of how each slice's solve went."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from torch import nn

from monai_deqkan._checks import check_choice
from monai_deqkan._complex import as_complex
from monai_deqkan.handlers.iteration_recorder import IterationRecorder
from monai_deqkan.metrics import border_signal, kspace_statistics, outside_training
from monai_deqkan.networks import EquilibriumError, EquilibriumProbe
from monai_deqkan.solvers import SolveStatus
from monai_deqkan.transforms import kspace_file_shape, read_kspace_header, recon_shape
from monai_deqkan.visualize.slice_sheet import slice_sheet

__all__ = ["ReconstructionWriter"]

logger = logging.getLogger(__name__)

_NOTE = "Research only; not for clinical use."
_NUMBERS = ("evaluations", "relative_residual", "certified_factor", "error_bound", "estimated_error")
_COLUMNS = ("evaluations", "relative_residual", "status", *_NUMBERS[2:], "border_signal", "unlike_training")
_MUCH_AT_THE_BORDER = 0.1
_ENDINGS = {"h5": ".h5", "nifti": ".nii.gz", "png": ".png"}


@dataclass(frozen=True)
class _Slice:
    """One slice's magnitude, its spread where there is one, and how its solve went, by column."""

    index: int
    image: NDArray[np.float32]
    spread: NDArray[np.float32] | None
    solve: dict[str, Any] = field(default_factory=dict)


class ReconstructionWriter:
    """Write ``<file>.h5`` with a data set ``reconstruction`` for each k-space file, and ``slices.csv``.

    ``reconstruction`` holds magnitudes ``(slices, H, W)``, float32, in the unit of the file's k-space; slices that were
    left out are missing from it, and the attribute ``slices`` lists those that are there. The fastMRI package's
    ``evaluate`` reads it. A third channel of the prediction, as :class:`~monai_deqkan.engines.SpreadInferer` makes it,
    is a standard deviation: data set ``spread``, same shape and unit.
    A volume is written as soon as its last slice is done; slices of one file must follow each other. Files of one name
    from several folders outside ``dataset_dir`` get numbers: ``a.h5``, ``a_2.h5``. Nothing is overwritten.

    The table has one line per slice: file, slice, and of its solve ``evaluations``, ``relative_residual`` and
    ``status``. A sample marked ``broken`` (:class:`~monai_deqkan.transforms.LoadKspaceSliced`) has a line with that
    status, and no image; a file of broken slices alone is not written. With ``network`` also ``certified_factor`` and
    ``error_bound``: how far the image is from the
    equilibrium at most, relative to its root mean square. It is proven (see
    :class:`~monai_deqkan.networks.EquilibriumError`), and empty for a network without a certificate. With
    ``estimate_error`` also ``estimated_error``: the same quantity estimated, which is not proven. ``unlike_training``
    names what of the data (coils, rows, columns, acceleration, noise level) lies outside the range of the training
    data. ``border_signal`` is that of :func:`~monai_deqkan.metrics.border_signal`, with a line in the log where an
    object seen with one map set reaches the border. The group ``solve`` of the HDF5 file holds all this
    of its slices, too; the attributes of ``spread`` say how it was made.

    A NIfTI volume has the axes (columns, rows, slices), and the pixel size of the file's ISMRMRD header; without one
    pixels of 1 mm, with a line in the log. Position and orientation are not in that header: the affine says what a
    picture with rows from front to back says, and nothing about the patient's. Nothing else of the header is written.

    Args:
        output_dir: folder to write into; made where absent.
        dataset_dir: folder that files were read from; folders below it are kept.
        formats: ``"h5"``, ``"nifti"``, ``"png"`` (the slices of a file side by side, to look at), or several.
        image_size: rows and columns to keep around the centre, -1 for all; ``"recon"``: those of the scanner's image,
            see :func:`recon_shape`, as fastMRI scores them. None keeps the image as it is.
        network: the network that the evaluator calls; None leaves the columns of errors empty.
        estimate_error: whether to estimate errors, which takes up to as many evaluations again.
        training_ranges: ranges of :func:`~monai_deqkan.metrics.kspace_statistics` in training; None leaves that column
            empty.

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
        network: nn.Module | None = None,
        estimate_error: bool = False,
        training_ranges: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.root = Path(dataset_dir).absolute()
        self.formats = (formats,) if isinstance(formats, str) else tuple(formats)
        for name in self.formats or ("",):
            check_choice("formats", name, tuple(_ENDINGS))
        if isinstance(image_size, str):
            check_choice("image_size", image_size, ("recon",))
        elif image_size is not None and len(image_size) != 2:
            raise ValueError(f"`image_size` must be rows and columns, 'recon' or None; got {image_size!r}.")
        self.image_size = image_size
        self.estimate_error = estimate_error
        self.training_ranges = training_ranges
        self._probe = None if network is None else EquilibriumProbe(network)
        self._recorder: IterationRecorder | None = None
        self._source = ""
        self._targets: dict[str, Path] = {}
        self._warned: set[str] = set()
        self._reaching: set[str] = set()
        self._spread_settings: dict[str, Any] = {}
        self._slices: list[_Slice] = []
        self._pixel_scale = (1.0, 1.0)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred`` and whose batch has ``source``, ``slice`` and ``scale``."""
        self._recorder = IterationRecorder.of(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        if self._probe is not None:
            engine.add_event_handler(Events.ITERATION_STARTED, self._probe.__enter__)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._probe.close)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, lambda _: self._flush())

    @property
    def table(self) -> Path:
        """The path of the table."""
        return self.output_dir / "slices.csv"

    def _start(self, engine: Any) -> None:
        self._spread_settings = dict(getattr(getattr(engine, "inferer", None), "settings", {}))
        self._source, self._targets, self._slices = "", {}, []
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.table.open("w", newline="") as file:
            csv.writer(file).writerow(["file", "slice", *_COLUMNS])

    def _collect(self, engine: Any) -> None:
        if self._recorder is None:
            return
        solves = self._solves()
        rows: list[list[Any]] = []
        for row, (sample, output) in enumerate(zip(engine.state.batch, engine.state.output, strict=True)):
            source, index = str(sample["source"]), int(sample["slice"])
            if source != self._source:
                self._flush()
                self._targets[source] = self._new_target(source)
                self._source = source
            target = self._targets[source]
            first = next(name for name in _ENDINGS if name in self.formats)
            written = target if first == "h5" else target.with_suffix(_ENDINGS[first])
            name = written.relative_to(self.output_dir).as_posix()
            if sample.get("broken"):
                rows.append([name, index, *("broken" if column == "status" else "" for column in _COLUMNS)])
                continue
            pred = torch.as_tensor(output["pred"]).detach().float()
            magnitude = torch.linalg.vector_norm(pred[:2], dim=0)
            images = [(part * float(sample["scale"])).cpu().numpy() for part in (magnitude, *pred[2:3])]
            solve = {
                **(solves[row] if row < len(solves) else {}),
                "border_signal": self._border_signal(magnitude, sample),
                "unlike_training": self._unlike_training(sample),
            }
            self._slices.append(_Slice(index, images[0], images[1] if len(images) > 1 else None, solve))
            scale = [float(value) for value in sample.get("pixel_scale", (1.0, 1.0))]
            self._pixel_scale = (scale[0], scale[1])
            rows.append([name, index, *(_shown(column, solve.get(column, "")) for column in _COLUMNS)])
        with self.table.open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def _solves(self) -> list[dict[str, Any]]:
        """Return how the solve of each sample went, by column."""
        if self._recorder is None:
            return []
        recorder = self._recorder.last
        evaluations, residual, status = recorder.evaluations(), recorder.relative_residual(), recorder.status()
        error: EquilibriumError | None = None
        if self._probe is not None:
            error = self._probe.errors(estimate=self.estimate_error)
        solves = []
        for row in range(len(status)):
            solve: dict[str, Any] = {
                "evaluations": int(evaluations[row]),
                "relative_residual": float(residual[row]),
                "status": SolveStatus(int(status[row])).name.lower(),
            }
            if error is not None and row < len(error.error_bound):  # further solves are of an ensemble
                solve["certified_factor"] = error.certified_factor
                solve["error_bound"] = float(error.error_bound[row])
                solve["estimated_error"] = float(error.estimated_error[row])
            solves.append(solve)
        return solves

    def _border_signal(self, magnitude: torch.Tensor, sample: Mapping[str, Any]) -> float:
        share, source = border_signal(magnitude), str(sample["source"])
        maps = sample.get("sensitivity_maps")
        one_set = maps is not None and maps.ndim == magnitude.ndim + 1 and len(maps) > 1  # of several coils
        if share > _MUCH_AT_THE_BORDER and one_set and source not in self._reaching:
            self._reaching.add(source)
            logger.warning(
                "The object in %s reaches the border of the field of view along the phase encoding. If it folds over "
                "there, one map set cannot hold it, and the image is wrong however well the solve converged: compare "
                "with two, `--maps_method espirit --num_map_sets 2`.",
                source,
            )
        return share

    def _unlike_training(self, sample: Mapping[str, Any]) -> str:
        if not self.training_ranges or "kspace" not in sample:
            return ""
        statistics = kspace_statistics(as_complex(torch.as_tensor(sample["kspace"])), sample.get("mask"))
        found = outside_training(statistics, self.training_ranges)
        if found and str(sample["source"]) not in self._warned:
            self._warned.add(str(sample["source"]))
            logger.warning(
                "Slices of %s are unlike the training data in: %s. Trust them less.", sample["source"], ", ".join(found)
            )
        return " ".join(found)

    def _flush(self) -> None:
        if not self._slices:
            return
        slices = sorted(self._slices, key=lambda item: item.index)
        if len({part.image.shape for part in slices}) > 1:
            raise ValueError(f"The slices of one file must have one size; those of {self._source} differ.")
        indices = [part.index for part in slices]
        volumes = {"reconstruction": self._cropped(np.stack([part.image for part in slices]).astype(np.float32))}
        spreads = [part.spread for part in slices if part.spread is not None]
        if spreads:
            volumes["spread"] = self._cropped(np.stack(spreads).astype(np.float32))
        target = self._targets[self._source]
        target.parent.mkdir(parents=True, exist_ok=True)
        if "h5" in self.formats:
            with h5py.File(target, "x") as file:
                for name, volume in volumes.items():
                    file.create_dataset(name, data=volume).attrs.update(
                        self._spread_settings if name == "spread" else {}
                    )
                for name in (*_NUMBERS, "border_signal"):
                    file[f"solve/{name}"] = np.array([part.solve.get(name, np.nan) for part in slices], dtype=float)
                for name in ("status", "unlike_training"):
                    file[f"solve/{name}"] = [str(part.solve.get(name, "")) for part in slices]
                file.attrs["slices"] = np.asarray(indices)
                file.attrs["note"] = f"monai-deqkan reconstruction. {_NOTE}"
                if self._is_simulated():
                    file.attrs["simulated"] = True
        if "nifti" in self.formats:
            for name, volume in volumes.items():
                ending = ".nii.gz" if name == "reconstruction" else f"_{name}.nii.gz"
                nib.save(self._nifti(volume, indices), target.with_name(target.stem + ending))
        if "png" in self.formats:
            labels = [f"slice {part.index} {part.solve.get('status', '')}" for part in slices]
            for name, volume in volumes.items():
                note = f"{name}; {_NOTE}"
                ending = ".png" if name == "reconstruction" else f"_{name}.png"
                slice_sheet(volume, labels, note).save(target.with_name(target.stem + ending))
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
        endings = [ending for kind in (".nii.gz", ".png") for ending in (kind, f"_spread{kind}")]
        for path in (target, *(target.with_name(target.stem + ending) for ending in endings)):
            if path.exists():
                raise FileExistsError(f"{path} exists and was not touched. Name a new `output_dir`, or move it away.")
        return target

    def _relative(self, source: str) -> Path:
        path = Path(source).absolute()
        return path.relative_to(self.root) if self.root in path.parents else Path(path.name)


def _shown(name: str, value: Any) -> Any:
    """Return a value as the table shows it: empty where it was not found or nothing is proven."""
    if not isinstance(value, float):
        return value
    unproven = name in ("certified_factor", "error_bound") and not np.isfinite(value)
    if unproven or np.isnan(value):
        return ""
    return f"{value:.6f}" if name == "certified_factor" else f"{value:.3e}"
