"""The sizes in a k-space file's ISMRMRD header. Nothing about the patient or the scan's date is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import h5py

__all__ = ["KspaceHeader", "read_kspace_header"]

_NAMESPACE = "{http://www.ismrm.org/ISMRMRD}"


@dataclass(frozen=True)
class KspaceHeader:
    """Sizes of an acquisition; x is the readout (rows in fastMRI's files), y and z are the phase encodings.

    Attributes:
        encoded_matrix: samples ``(x, y, z)`` of k-space.
        recon_matrix: pixels ``(x, y, z)`` of the scanner's image, without readout oversampling.
        encoded_fov: field of view ``(x, y, z)`` of k-space in mm, with oversampling; None where the header has none.
        recon_fov: field of view ``(x, y, z)`` of the image in mm; None where the header has none.
        accelerations: parallel imaging factors along y and z, dimensionless; ones where the header has none.
        center_line: index of the line of zero frequency along y among the measured ones.
        last_line: index of the last measured line along y.
    """

    encoded_matrix: tuple[int, int, int]
    recon_matrix: tuple[int, int, int]
    encoded_fov: tuple[float, float, float] | None = None
    recon_fov: tuple[float, float, float] | None = None
    accelerations: tuple[float, float] = (1.0, 1.0)
    center_line: int | None = None
    last_line: int | None = None

    def pixel_size(self, rows: int, columns: int) -> tuple[float, float, float] | None:
        """Return the pixel size ``(rows, columns, slices)`` in mm of the Fourier transform of k-space.

        Args:
            rows: samples of k-space along the readout.
            columns: samples of k-space along the phase encoding.

        Returns:
            Field of view of k-space over its number of samples; None where the header has no field of view.
        """
        if self.encoded_fov is None:
            return None
        x, y, z = self.encoded_fov
        return x / rows, y / columns, z / self.encoded_matrix[2]


def read_kspace_header(path: str | Path) -> KspaceHeader | None:
    """Read the ISMRMRD header of a k-space file in fastMRI's layout (data set ``ismrmrd_header``).

    Args:
        path: HDF5 file.

    Returns:
        The header's sizes, of the first encoding; None where the file has no header.

    Raises:
        OSError: if the file cannot be read as HDF5.
        ValueError: if the header is no XML, or lacks a matrix size.
    """
    with h5py.File(path, "r") as file:
        text = file["ismrmrd_header"][()] if "ismrmrd_header" in file else None
    if text is None:
        return None
    try:
        root = ElementTree.fromstring(text if isinstance(text, (bytes, str)) else bytes(text))
    except (ElementTree.ParseError, TypeError, ValueError):
        # The parser's own message may quote the header, where names of patients stand.
        raise ValueError(f"The ISMRMRD header of {path} must be XML; it cannot be parsed. Repair the file.") from None

    def value(*names: str) -> float | None:
        found = root.find("/".join(f"{_NAMESPACE}{name}" for name in ("encoding", *names)))
        try:
            number = None if found is None or found.text is None else float(found.text)
        except ValueError:
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{'/'.join(names)} in the ISMRMRD header of {path} must be a number.")
        return number

    def whole(*names: str) -> int | None:
        number = value(*names)
        return None if number is None else int(number)

    def triple(*names: str) -> tuple[float, float, float] | None:
        found = [value(*names, axis) for axis in "xyz"]
        x, y, z = (-1.0 if number is None else number for number in found)
        return (x, y, z) if min(x, y, z) > 0 else None

    matrices = []
    for space in ("encodedSpace", "reconSpace"):
        size = triple(space, "matrixSize")
        if size is None:
            raise ValueError(f"The ISMRMRD header of {path} must have {space}/matrixSize with positive x, y and z.")
        matrices.append((int(size[0]), int(size[1]), int(size[2])))
    step = "kspace_encoding_step_1"
    factors = [value("parallelImaging", "accelerationFactor", f"kspace_encoding_step_{axis}") for axis in (1, 2)]
    return KspaceHeader(
        encoded_matrix=matrices[0],
        recon_matrix=matrices[1],
        encoded_fov=triple("encodedSpace", "fieldOfView_mm"),
        recon_fov=triple("reconSpace", "fieldOfView_mm"),
        accelerations=(factors[0] or 1.0, factors[1] or 1.0),
        center_line=whole("encodingLimits", step, "center"),
        last_line=whole("encodingLimits", step, "maximum"),
    )
