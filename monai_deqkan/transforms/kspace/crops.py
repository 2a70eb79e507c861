"""Two crops of k-space that must not be mixed up: of the field of view, and of the resolution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import torch
from monai.config.type_definitions import KeysCollection
from monai.networks.blocks.fft_utils_t import fftn_centered_t, ifftn_centered_t
from monai.transforms.transform import MapTransform, Transform
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.transforms.kspace.checks import check_kspace, has_gaps
from monai_deqkan.transforms.kspace.header import read_kspace_header

__all__ = ["CropCoilImages", "CropCoilImagesd", "CropKspace", "CropKspaced", "recon_shape"]


class CropCoilImages(Transform):
    """Crop the field of view: transform k-space to coil images, keep their centre, and transform back.

    It is no crop of k-space (:class:`CropKspace`): the pixel size stays. It comes before :class:`UndersampleKspace`,
    since a crop along an undersampled axis would fill the missing lines. fastMRI's readout is oversampled twice; this
    removes it.

    Args:
        spatial_size: pixels to keep per axis; -1, or an axis that is already smaller, leaves it as it is.
    """

    def __init__(self, spatial_size: Sequence[int]) -> None:
        self.spatial_size = _sizes(spatial_size)

    def __call__(self, kspace: Tensor) -> Tensor:
        """Crop k-space ``(K, *space)`` to ``(K, *spatial_size)``.

        Raises:
            ValueError: if the number of axes differs, or lines are missing along a phase encoding that is cropped.
        """
        _check_axes(kspace, self.spatial_size)
        for axis, size in enumerate(self.spatial_size[1:], start=2):
            if 0 < size < kspace.shape[axis] and has_gaps(kspace, axis):
                raise ValueError(
                    f"CropCoilImages cannot crop along axis {axis}, where lines of k-space are missing. Crop before "
                    "undersampling, or set its `spatial_size` to -1."
                )
        for axis, size in enumerate(self.spatial_size, start=1):
            # Axes that stay are not transformed: rounding would leave traces in lines that were not measured.
            if 0 < size < kspace.shape[axis]:
                kspace = _crop_axis(kspace, axis, size)
        return kspace


class CropKspace(Transform):
    r"""Crop k-space itself: drop the high frequencies. The field of view stays, pixels grow, the resolution is lower.

    The rest is multiplied by :math:`\sqrt{n / N}`, samples kept over samples, which keeps the brightness of images.

    Args:
        spatial_size: samples to keep per axis around zero frequency (index ``n // 2``); -1, or an axis that is already
            smaller, leaves it as it is.

    Example:
        >>> import torch
        >>> from monai_deqkan.operators import FourierOperator
        >>> kspace = FourierOperator(2)(torch.full((1, 8, 8), 3.0, dtype=torch.complex64))
        >>> FourierOperator(2).adjoint(CropKspace((4, 4))(kspace)).real[0, 0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self, spatial_size: Sequence[int]) -> None:
        self.spatial_size = _sizes(spatial_size)

    def __call__(self, kspace: Tensor) -> Tensor:
        """Crop k-space ``(K, *space)`` to ``(K, *spatial_size)``.

        Raises:
            ValueError: if the number of axes differs.
        """
        _check_axes(kspace, self.spatial_size)
        kept = _center(kspace, self.spatial_size)
        return kept * math.sqrt(kept[0].numel() / kspace[0].numel())


class CropCoilImagesd(MapTransform):
    """Crop the field of view of k-space; see :class:`CropCoilImages`.

    Args:
        keys: keys of k-space.
        spatial_size: pixels to keep per axis, -1 for all; or ``"recon"``: the size of the scanner's image, by the
            file's header, see :func:`recon_shape`.
        source_key: key of the file's path, as set by :class:`LoadKspaceSliced`; used with ``"recon"``.
        allow_missing_keys: whether to skip absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        spatial_size: Sequence[int] | str = (-1, -1),
        source_key: str = "source",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if isinstance(spatial_size, str) and spatial_size != "recon":
            raise ValueError(f"`spatial_size` must be sizes such as [320, -1], or 'recon'; got {spatial_size!r}.")
        self.crop = None if isinstance(spatial_size, str) else CropCoilImages(spatial_size)
        self.source_key = source_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop all keys."""
        item = dict(data)
        if self.crop is None and self.source_key not in item:
            raise KeyError(f"With 'recon', an item must have '{self.source_key}'; it has {sorted(map(str, item))}.")
        crop = self.crop or CropCoilImages(recon_shape(item[self.source_key]))
        for key in self.key_iterator(item):
            item[key] = crop(item[key])
        return item


class CropKspaced(MapTransform):
    """Lower the resolution of k-space; see :class:`CropKspace`.

    Args:
        keys: keys of k-space.
        spatial_size: samples to keep per axis, -1 for all.
        pixel_scale_key: key for how much larger pixels are after the crop, one number per axis; outputs that state a
            pixel size need it.
        allow_missing_keys: whether to skip absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        spatial_size: Sequence[int] = (-1, -1),
        pixel_scale_key: str = "pixel_scale",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.crop = CropKspace(spatial_size)
        self.pixel_scale_key = pixel_scale_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop all keys."""
        item = dict(data)
        for key in self.key_iterator(item):
            full = item[key].shape[1:]
            item[key] = self.crop(item[key])
            item[self.pixel_scale_key] = [old / new for old, new in zip(full, item[key].shape[1:], strict=True)]
        return item


def _crop_axis(kspace: Tensor, axis: int, size: int) -> Tensor:
    """Crop the field of view along one axis."""
    image = torch.view_as_complex(ifftn_centered_t(kspace.movedim(axis, -1), spatial_dims=1, is_complex=False))
    kept = _center(image, (*[-1] * (image.ndim - 2), size))
    return torch.view_as_complex(fftn_centered_t(kept, spatial_dims=1, is_complex=False)).movedim(-1, axis)


def recon_shape(path: str | Path) -> tuple[int, int]:
    """Return the rows and columns of the scanner's own image of a k-space file in fastMRI's layout.

    From its ISMRMRD header, or where there is none from the stored reconstruction.

    Raises:
        ValueError: if the file has neither.
    """
    header = read_kspace_header(path)
    if header is not None:
        return header.recon_matrix[:2]
    with h5py.File(path, "r") as file:
        for name in ("reconstruction_rss", "reconstruction_esc"):
            if name in file:
                rows, columns = file[name].shape[-2:]
                return rows, columns
    raise ValueError(f"{path} has neither an ISMRMRD header nor a reconstruction that tells its image's size. Give it.")


def _sizes(spatial_size: Sequence[int]) -> tuple[int, ...]:
    return tuple(-1 if size == -1 else check_int("spatial_size", size) for size in spatial_size)


def _check_axes(kspace: Tensor, sizes: tuple[int, ...]) -> None:
    check_kspace(kspace)
    if kspace.ndim != len(sizes) + 1:
        raise ValueError(f"`spatial_size` {sizes} does not fit k-space of shape {tuple(kspace.shape)}.")


def _center(data: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Keep the central block of ``(K, *space)``: index ``n // 2`` stays the centre."""
    for axis, size in enumerate(sizes, start=1):
        full = data.shape[axis]
        if 0 < size < full:
            data = data.narrow(axis, full // 2 - size // 2, size)
    return data
