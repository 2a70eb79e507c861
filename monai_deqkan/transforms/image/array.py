"""Read medical images and label masks of any common format into channel-first MetaTensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader, PILReader, PydicomReader
from monai.data.utils import orientation_ras_lps
from monai.transforms import Transform
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.misc import is_dicom
from torch import Tensor

from monai_deqkan._checks import check_int, check_spatial_dims

__all__ = ["LoadMask", "LoadMedicalImage", "read_image"]

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
_PIL_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class LoadMedicalImage(Transform):
    """Read one image file: PNG, JPEG, BMP, TIFF, NIfTI, DICOM, MetaImage or NRRD.

    The first spatial axis is x, from left to right in a picture, as in all of MONAI's readers. DICOM values are
    rescaled, clipped to the window where the file has one, and inverted for MONOCHROME1, so that bright means much
    signal. Of the file's header only geometry and name are kept: nothing about the patient.

    Args:
        spatial_dims: 2 or 3. To reach 2, an axis of length one is dropped: the last one, or the only one.
            ``meta["dropped_axis"]`` tells which (-1 for none); the affine's columns are then those of the axes that
            are left, and its own.
        channels: number of channels wanted. Three channels are turned into one by ITU-R BT.601 luminance, one into
            three by repeating it; alpha is dropped.

    Returns:
        MetaTensor of float32, shape ``(channels, *space)``, in the file's own intensity unit, with ``affine`` (mm, RAS)
        and ``meta["filename_or_obj"]``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or has other dimensions or channels, or NaN or infinite values.
    """

    def __init__(self, spatial_dims: int = 2, channels: int = 1) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.channels = check_int("channels", channels)

    def __call__(self, path: str | Path) -> MetaTensor:
        """Read the image at ``path``."""
        image = _with_spatial_dims(read_image(path), self.spatial_dims)
        found = image.shape[0]
        if found == self.channels:
            return image
        if (found, self.channels) == (3, 1):
            weights = torch.tensor(_LUMINANCE).reshape(3, *[1] * self.spatial_dims)
            return _like(image, (image.as_tensor() * weights).sum(0, keepdim=True))
        if (found, self.channels) == (1, 3):
            return _like(image, image.as_tensor().repeat(3, *[1] * self.spatial_dims))
        raise ValueError(
            f"The image must have {self.channels} channel(s), or 1 or 3 that can be turned into them; {path} has "
            f"{found}. Set `channels`, or convert the file."
        )


class LoadMask(Transform):
    """Read one label mask and turn its pixel values into class indices.

    Args:
        values: the distinct pixel values of all masks, sorted; the position of a value is its class, so the lowest
            is class 0, the background. ``monai_deqkan.data.mask_values`` finds them.
        spatial_dims: 2 or 3.

    Returns:
        MetaTensor of int64, shape ``(1, *space)``, values in ``[0, len(values))``. In a coloured palette image the
        palette's indices count as the values; an RGB mask must have three equal channels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, has other dimensions, coloured pixels, or a value that is not in
            ``values``.
    """

    def __init__(self, values: Sequence[int], spatial_dims: int = 2) -> None:
        super().__init__()
        self.values = [int(value) for value in values]
        if len(self.values) < 2 or self.values != sorted(set(self.values)):
            raise ValueError(f"`values` must be at least two distinct integers in ascending order; got {list(values)}.")
        self.spatial_dims = check_spatial_dims(spatial_dims)

    def __call__(self, path: str | Path) -> MetaTensor:
        """Read the mask at ``path``."""
        mask = _with_spatial_dims(read_image(path, is_mask=True), self.spatial_dims)
        values = torch.tensor(self.values, dtype=torch.float32)
        pixels = mask.as_tensor().contiguous()
        classes = torch.searchsorted(values, pixels).clamp(max=len(values) - 1)
        unknown = pixels[values[classes] != pixels].unique()
        if len(unknown) > 0:
            shown = ", ".join(f"{value:g}" for value in unknown[:5].tolist())
            raise ValueError(
                f"The mask {path} may hold only the values {self.values}; it also holds {shown}. Give every class of "
                "the data set, and save masks without lossy compression."
            )
        return _like(mask, classes)


def read_image(path: str | Path, *, is_mask: bool = False) -> MetaTensor:
    """Read an image of any supported format as it is.

    Args:
        path: the file.
        is_mask: read a coloured palette image as its indices, and demand one channel, or three equal ones.

    Returns:
        MetaTensor of float32, shape ``(channels, *space)``, with geometry and file name only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or holds complex, NaN or infinite values.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no image file {file}. Check the path.")
    name, dicom = file.name.lower(), is_dicom(file) or file.suffix.lower() == ".dcm"
    reader: ImageReader
    if dicom:
        reader = _DicomReader(is_mask)
    elif name.endswith(_PIL_SUFFIXES):
        reader = _PictureReader(is_mask)
    else:
        reader = NibabelReader() if name.endswith((".nii", ".nii.gz")) else ITKReader()
    try:
        with warnings.catch_warnings():
            # The readers warn with header values in the text, which may be those of a patient.
            warnings.simplefilter("ignore")
            array, meta = reader.get_data(reader.read(str(file)))
    except Exception as error:
        # A DICOM error may quote the header, so only its kind is told.
        reason = type(error).__name__ if dicom else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"The image {file} cannot be read ({reason}). It may be damaged, cut off, or of another format than its "
            "name says."
        ) from None
    pixels = torch.from_numpy(_channel_first(np.asarray(array), len(meta["spatial_shape"]), file))
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError(f"The image {file} must be finite; it holds NaN or infinite values. Repair or remove it.")
    if is_mask:
        if pixels.shape[0] not in (1, 3) or bool((pixels != pixels[:1]).any()):
            raise ValueError(
                f"The mask {file} must have one channel, or three equal ones; it has {pixels.shape[0]} that differ. "
                "Save the mask as a grey image with one value per class."
            )
        pixels = pixels[:1]
    return _tracked(pixels, torch.as_tensor(meta.get("affine", np.eye(4)), dtype=torch.float64), str(file))


def has_position(path: Path) -> bool:
    """Tell whether a DICOM file says how its pixels lie in the patient: slices and volumes do, radiographs do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dcmread(path, force=True, stop_before_pixels=True)
    return "ImageOrientationPatient" in _dicom_group(data, "PlaneOrientationSequence")


class _PictureReader(PILReader):
    """MONAI's reader, closing the file also where it is damaged."""

    def __init__(self, is_mask: bool) -> None:
        super().__init__()
        self.prepare = _indices_or_grey if is_mask else _grey_or_rgb

    def read(self, data: Any, **kwargs: Any) -> Any:
        with Image.open(data, **kwargs) as picture:
            return self.prepare(picture)


class _DicomReader(PydicomReader):
    """MONAI's reader with window, inverted greys and multi-frame volumes, and without the header in the result."""

    def __init__(self, is_mask: bool) -> None:
        super().__init__()
        self.is_mask = is_mask

    def get_data(self, data: Dataset) -> tuple[NDArray[Any], dict[str, Any]]:
        colored = int(data.get("SamplesPerPixel", 1)) > 1
        pixels = np.asarray(data.pixel_array, dtype=np.float32)
        space = pixels.ndim - 1 if colored else pixels.ndim
        if not colored:
            pixels = _dicom_grey(data, pixels, clip=not self.is_mask)
        if space == 3:
            pixels = np.moveaxis(pixels, 0, 2)  # frames last
        pixels = np.ascontiguousarray(np.swapaxes(pixels, 0, 1))
        return pixels, {"spatial_shape": pixels.shape[:space], "affine": _dicom_affine(data)}


def _dicom_group(data: Dataset, name: str, frame: int = 0) -> Dataset:
    """Return the functional group of an enhanced multi-frame file, or the data set itself where there is none."""
    per_frame = data.get("PerFrameFunctionalGroupsSequence")
    for groups in ([per_frame[frame]] if per_frame else []) + list(data.get("SharedFunctionalGroupsSequence") or []):
        if groups.get(name):
            return groups[name][0]
    return data


def _first(value: Any) -> float:
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)


def _dicom_grey(data: Dataset, pixels: NDArray[Any], clip: bool) -> NDArray[Any]:
    """Rescale, clip to the first window, and invert MONOCHROME1 (DICOM PS3.3, C.11.1, C.11.2, C.7.6.3.1.2)."""
    rescale = _dicom_group(data, "PixelValueTransformationSequence")
    pixels = pixels * float(rescale.get("RescaleSlope", 1)) + float(rescale.get("RescaleIntercept", 0))
    if not clip:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    window = _dicom_group(data, "FrameVOILUTSequence")
    if window.get("WindowCenter") is not None and window.get("WindowWidth") is not None:
        center, width = _first(window.WindowCenter), _first(window.WindowWidth)
        if window.get("VOILUTFunction", "LINEAR") == "LINEAR" and width > 1:
            center, width = center - 0.5, width - 1
        low, high = center - width / 2, center + width / 2
        pixels = np.clip(pixels, low, high)
    inverted = data.get("PhotometricInterpretation") == "MONOCHROME1"
    return low + high - pixels if inverted else pixels


def _dicom_affine(data: Dataset) -> NDArray[Any]:
    """Return the map from (column, row, frame) to mm in RAS (DICOM PS3.3, C.7.6.2.1.1).

    Files without a position in the patient, such as radiographs, lie in the axial plane at the origin.
    """
    measures = _dicom_group(data, "PixelMeasuresSequence")
    spacing = measures.get("PixelSpacing") or data.get("ImagerPixelSpacing") or (1.0, 1.0)
    orientation = _dicom_group(data, "PlaneOrientationSequence").get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0)
    axes = np.asarray(orientation, dtype=float).reshape(2, 3)
    frames = int(data.get("NumberOfFrames") or 1)
    thickness = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1.0
    first, last = (
        np.asarray(
            _dicom_group(data, "PlanePositionSequence", frame).get("ImagePositionPatient") or (0, 0, 0), dtype=float
        )
        for frame in (0, frames - 1)
    )
    moved = frames > 1 and not np.allclose(first, last)
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * float(spacing[1])
    affine[:3, 1] = axes[1] * float(spacing[0])
    affine[:3, 2] = (last - first) / (frames - 1) if moved else np.cross(axes[0], axes[1]) * float(thickness)
    affine[:3, 3] = first
    return np.asarray(orientation_ras_lps(affine))


def _one_page(image: Image.Image) -> Image.Image:
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise ValueError(f"it has {pages} pages; save a volume as NIfTI, or one file per page")
    image.load()
    return image


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    image = _one_page(image)
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")
    return image if image.mode in ("L", "RGB", "F") or image.mode.startswith("I") else image.convert("RGB")


def _indices_or_grey(image: Image.Image) -> Image.Image:
    """Keep the indices of a coloured palette: they are the labels; a grey palette only stores grey values."""
    if image.mode == "P":
        colors = np.asarray(_one_page(image).convert("RGBA"))[..., :3]
        return image if (colors != colors[..., :1]).any() else image.convert("L")
    return _grey_or_rgb(image)


def _channel_first(array: NDArray[Any], space: int, file: Path) -> NDArray[Any]:
    """Return float32 data with the channels in front."""
    if array.dtype.fields:  # NIfTI's RGB voxels
        array = np.stack([array[field] for field in ("R", "G", "B")], axis=-1)
    if np.iscomplexobj(array):
        raise ValueError(f"The image {file} must be real; it holds complex values. Save its magnitude.")
    array = array.astype(np.float32)
    while array.ndim > space + 1 and array.shape[space] == 1:
        array = array.squeeze(space)
    if array.ndim > space + 1:
        raise ValueError(f"The image {file} may have {space} spatial axes and one for channels; got {array.shape}.")
    return np.ascontiguousarray(np.moveaxis(array, -1, 0) if array.ndim > space else array[None])


def _with_spatial_dims(image: MetaTensor, spatial_dims: int) -> MetaTensor:
    pixels, affine = image.as_tensor(), image.affine
    dropped = -1
    if spatial_dims == 2 and pixels.ndim == 4:
        flat = [axis for axis in range(3) if pixels.shape[axis + 1] == 1]
        if len(flat) == 1 or 2 in flat:
            dropped = 2 if 2 in flat else flat[0]
            order = [axis for axis in range(3) if axis != dropped]
            pixels, affine = pixels.squeeze(dropped + 1), affine[:, [*order, dropped, 3]]
    if pixels.ndim - 1 != spatial_dims:
        raise ValueError(
            f"The image must have {spatial_dims} spatial dimensions; {image.meta['filename_or_obj']} has "
            f"{pixels.ndim - 1}, shape {tuple(pixels.shape[1:])}. Set `spatial_dims`, or convert the file."
        )
    return _tracked(pixels, affine, image.meta["filename_or_obj"], dropped)


def _like(image: MetaTensor, pixels: Tensor) -> MetaTensor:
    return _tracked(pixels, image.affine, image.meta["filename_or_obj"], image.meta["dropped_axis"])


def _tracked(pixels: Tensor, affine: Tensor, name: str, dropped_axis: int = -1) -> MetaTensor:
    meta = {
        "dropped_axis": dropped_axis,
        "filename_or_obj": name,
        "original_affine": affine.clone(),
        "original_channel_dim": 0,
        "space": "RAS",
        "spatial_shape": np.asarray(pixels.shape[1:]),
    }
    return MetaTensor(pixels, affine=affine, meta=meta)
