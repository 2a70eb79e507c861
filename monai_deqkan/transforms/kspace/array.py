"""Transforms of the k-space of one slice or volume, without batch axis: ``(K, *space)`` with coils ``K``.

The chain of a training item: :class:`LoadKspaceSlice`, ``CropCoilImages`` (optional), a copy of the full k-space,
:class:`UndersampleKspace`, :class:`EstimateSensitivityMaps`, :class:`ReferenceImage` of the copy with these maps,
:class:`NormalizeKspace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from monai.transforms.transform import RandomizableTransform, Transform
from torch import Tensor

from monai_deqkan._checks import check_choice, check_finite, check_int, check_range
from monai_deqkan._complex import complex_to_channels
from monai_deqkan.operators import (
    MASKS,
    CoilOperator,
    FourierOperator,
    espirit_maps,
    estimate_sensitivity_maps,
)
from monai_deqkan.transforms.kspace.checks import check_kspace, check_maps, masked

__all__ = [
    "EstimateSensitivityMaps",
    "LoadKspaceSlice",
    "MaskKspace",
    "NormalizeKspace",
    "ReferenceImage",
    "UndersampleKspace",
    "kspace_file_shape",
]

_CROP_OF_SETS = 0.8  # `crop` of espirit_maps: without one, further sets hold noise where one coil pattern explains all


def kspace_file_shape(path: str | Path) -> tuple[int, int, int, int]:
    """Return the shape ``(slices, K, H, W)`` of the k-space in an HDF5 file, without reading it.

    Args:
        path: a file with a complex data set ``kspace``, ``(slices, K, H, W)`` or, single-coil, ``(slices, H, W)``.

    Raises:
        OSError: if the file cannot be read as HDF5.
        ValueError: if it has no such data set.
    """
    with h5py.File(path, "r") as file:
        return _dataset_shape(file, path)


def _dataset_shape(file: h5py.File, path: str | Path) -> tuple[int, int, int, int]:
    dataset = file.get("kspace")
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path} must hold a data set 'kspace'; it holds {sorted(file)}. Is it fastMRI's layout?")
    if not np.issubdtype(dataset.dtype, np.complexfloating):
        raise ValueError(f"'kspace' in {path} must be complex; got {dataset.dtype}.")
    if dataset.ndim not in (3, 4) or 0 in dataset.shape:
        raise ValueError(
            f"'kspace' in {path} must have shape (slices, coils, H, W), or (slices, H, W) for a single coil; got "
            f"{dataset.shape}. Add the missing axis."
        )
    slices, *rest = dataset.shape
    height, width = rest[-2:]
    return slices, rest[0] if len(rest) == 3 else 1, height, width


class LoadKspaceSlice(Transform):
    """Read the k-space of one slice from an HDF5 file in fastMRI's layout; nothing else is read.

    Args:
        check: whether to refuse values that are not finite.

    Example:
        >>> LoadKspaceSlice()("missing.h5", 0)
        Traceback (most recent call last):
        FileNotFoundError: ...
    """

    def __init__(self, check: bool = True) -> None:
        self.check = check

    def __call__(self, path: str | Path, index: int = 0) -> Tensor:
        """Read a slice.

        Args:
            path: a file as for :func:`kspace_file_shape`.
            index: which slice, from 0.

        Returns:
            Complex64 in the file's unit, shape ``(K, H, W)``; ``K`` is 1 for single-coil files.

        Raises:
            OSError: if the file is missing or cannot be read as HDF5.
            ValueError: if its k-space has another rank or type or is not finite, or there is no such slice.
        """
        with h5py.File(path, "r") as file:
            slices, coils, height, width = _dataset_shape(file, path)
            if not 0 <= int(index) < slices:
                raise ValueError(f"{path} has slices 0 to {slices - 1}; got {index}.")
            data = np.asarray(file["kspace"][int(index)], dtype=np.complex64)
        kspace = torch.from_numpy(data).reshape(coils, height, width)
        if self.check:
            check_finite(f"kspace of slice {index} in {path}", kspace, "Remove the slice, or repair the file.")
        return kspace


class UndersampleKspace(RandomizableTransform):
    """Keep only the samples of a Cartesian mask: lines along the last axis, or points of the last two.

    Args:
        accelerations: one value, or several of which each call draws one; lines per measured line, centre included.
        center_fractions: share of lines in the fully sampled centre, as many values; drawn as a pair.
        pattern: a mask's name in :data:`monai_deqkan.operators.MASKS`: lines (``"equispaced"``, ``"random"``,
            ``"gaussian"``), or points in the plane of two phase encodings, of which a slice across the readout has both
            (``"gaussian_plane"``, ``"poisson_disc"``, ``"pseudo_radial"``); or several, of which each call draws one.
    """

    def __init__(
        self,
        accelerations: float | Sequence[float] = 4.0,
        center_fractions: float | Sequence[float] = 0.08,
        *,
        pattern: str | Sequence[str] = "equispaced",
    ) -> None:
        super().__init__(prob=1.0)
        self.accelerations = _as_tuple(accelerations)
        self.center_fractions = _as_tuple(center_fractions)
        if len(self.accelerations) != len(self.center_fractions) or not self.accelerations:
            raise ValueError(
                "`accelerations` and `center_fractions` must be equally long; got "
                f"{len(self.accelerations)} and {len(self.center_fractions)} values."
            )
        names = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        if not names:
            raise ValueError("`pattern` must name a mask, or several; got none.")
        self.draws = tuple(MASKS[check_choice("pattern", name, MASKS)] for name in names)
        self._seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw the seed of the next mask."""
        self._seed = int(self.R.randint(2**31))

    def __call__(self, kspace: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Undersample k-space.

        Args:
            kspace: complex, shape ``(K, *space)``.
            seed: makes the mask; None draws another one in every call.

        Returns:
            K-space with zeros where the mask is false, and the mask: bool, ``(1, 1, W)`` or, in 3-D, ``(1, 1, 1, D)``
            for lines, with the sizes of the last two axes for points.

        Raises:
            ValueError: if k-space has another shape, or holds no signal where the mask is true.
        """
        check_kspace(kspace)
        if seed is None:
            self.randomize()
        generator = torch.Generator().manual_seed(self._seed if seed is None else seed)
        pick = int(torch.randint(len(self.accelerations), (), generator=generator))
        space = tuple(kspace.shape[1:])
        draw = self.draws[0]
        if len(self.draws) > 1:
            draw = self.draws[int(torch.randint(len(self.draws), (), generator=generator))]
        mask = draw(space, self.accelerations[pick], self.center_fractions[pick], generator=generator)
        mask = mask.unsqueeze(0).to(kspace.device)
        return masked(kspace, mask), mask


class MaskKspace(Transform):
    """Keep only the samples of a given mask, such as that of a scanner's protocol.

    Args:
        mask: for all calls that give none: bool or real, every entry other than zero counts as measured; lines ``(W,)``
            along the last axis, ``(*space)``, or with as many axes as k-space, of which each may have size one.
    """

    def __init__(self, mask: Tensor | np.ndarray | None = None) -> None:
        self.mask = None if mask is None else torch.as_tensor(mask)

    def __call__(self, kspace: Tensor, mask: Tensor | np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Undersample k-space.

        Args:
            kspace: complex, shape ``(K, *space)``.
            mask: for this call, as for the class; None takes the class's.

        Returns:
            K-space with zeros where the mask is zero, and the mask: bool, with as many axes as ``kspace``.

        Raises:
            ValueError: if there is no mask, or it does not fit, is not finite, or keeps nothing.
        """
        check_kspace(kspace)
        if mask is None and self.mask is None:
            raise ValueError("MaskKspace needs a `mask`, of the class or of the call; got none.")
        keep = torch.as_tensor(self.mask if mask is None else mask, device=kspace.device)
        if keep.is_complex():
            raise TypeError(f"`mask` must be bool or real; got {keep.dtype}.")
        check_finite("mask", keep)
        keep = (keep != 0).reshape((1,) * (kspace.ndim - keep.ndim) + tuple(keep.shape))
        return masked(kspace, keep), keep


class ReferenceImage(Transform):
    r"""Make the reference from fully sampled k-space: the SENSE combination, and the root sum of squares.

    The SENSE combination :math:`\sum_k \bar S_k x_k` is what a reconstruction with sensitivity maps converges to when
    all data are measured, so it is the target of training. With several coils, maps estimated from the same data take
    up the smooth phase, so its phase is near zero; a single coil (:math:`S = 1`) keeps its phase. Its magnitude is at
    most the root sum of squares (equal where the maps are exact), which is what fastMRI scores against.

    Args:
        num_center_lines: see :func:`estimate_sensitivity_maps`; None takes its default.
    """

    def __init__(self, num_center_lines: int | None = None) -> None:
        self.num_center_lines = num_center_lines

    def __call__(self, kspace: Tensor, sensitivity_maps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Combine coils.

        Args:
            kspace: fully sampled, complex, shape ``(K, *space)``.
            sensitivity_maps: complex, same shape; None estimates them from ``kspace``.

        Returns:
            In the unit of ``kspace``, float32: the combination as two channels ``(2, *space)``, and the root sum of
            squares ``(1, *space)``.

        Raises:
            ValueError: if k-space has another shape, or the maps another size than it.
        """
        check_kspace(kspace)
        if sensitivity_maps is None:
            sensitivity_maps = EstimateSensitivityMaps(num_center_lines=self.num_center_lines)(
                kspace, torch.ones((1,) * kspace.ndim, dtype=torch.bool)
            )
        check_maps(sensitivity_maps, kspace)
        images = FourierOperator(kspace.ndim - 1).adjoint(kspace)
        combined = CoilOperator(sensitivity_maps.unsqueeze(0)).adjoint(images.unsqueeze(0))
        rss = images.abs().square().sum(dim=0, keepdim=True).sqrt()
        return complex_to_channels(combined)[0].float(), rss.float()


class NormalizeKspace(Transform):
    """Divide k-space by one number so that the zero-filled image has a fixed brightness.

    The scale is a percentile of the root sum of squares of the coil images. It needs nothing but the measured data, so
    training and inference share it; nothing is shifted, so zero stays zero.

    Args:
        percentile: which percentile becomes 1, in ``(0, 100]``; 100 is the maximum.
        allow_empty: whether k-space that is zero everywhere, an empty slice, is returned as it is, with a scale of 1.
    """

    def __init__(self, percentile: float = 99.0, allow_empty: bool = False) -> None:
        self.percentile = check_range("percentile", percentile, 0.0, 100.0, open_low=True)
        self.allow_empty = allow_empty

    def __call__(self, kspace: Tensor) -> tuple[Tensor, Tensor]:
        """Scale k-space.

        Args:
            kspace: complex, shape ``(K, *space)``.

        Returns:
            Scaled k-space, and the scale in its old unit, a float32 scalar: ``scaled * scale`` is the original.

        Raises:
            ValueError: if the percentile is zero, as for k-space without signal.
        """
        check_kspace(kspace)
        if self.allow_empty and not bool(kspace.any()):
            return kspace, torch.ones((), device=kspace.device)
        images = FourierOperator(kspace.ndim - 1).adjoint(kspace)
        rss = images.abs().square().sum(dim=0).sqrt().flatten()
        rank = max(round(self.percentile / 100 * rss.numel()), 1)
        scale = rss.kthvalue(rank).values.float()
        if not scale > 0:
            raise ValueError(
                f"`kspace` must hold a signal to be normalized; the {self.percentile:g}th percentile of its image is "
                f"{scale.item():g}. Remove empty slices or set `allow_empty`, or raise `percentile`."
            )
        return kspace / scale, scale


class EstimateSensitivityMaps(Transform):
    """Estimate coil maps of one item from the fully sampled centre of its k-space.

    Args:
        num_center_lines: width of the central block in lines; None finds it from the mask.
        max_center_lines: upper limit of a block that is found, in lines.
        method: ``"low_frequency"`` (:func:`monai_deqkan.operators.estimate_sensitivity_maps`) or ``"espirit"``
            (:func:`monai_deqkan.operators.espirit_maps`, slower and sharper), which always finds its block.
        allow_empty: whether k-space that is zero everywhere, an empty slice, gets maps of equal, constant values.
        num_sets: number of map sets, for ``"espirit"``: two hold an object that folds over in the field of view. Of two
            or more, maps are zero where less than 0.8 of the signal is theirs.

    Raises:
        ValueError: for an unknown method, or settings that a method does not know.
    """

    def __init__(
        self,
        num_center_lines: int | None = None,
        max_center_lines: int = 24,
        method: str = "low_frequency",
        allow_empty: bool = False,
        num_sets: int = 1,
    ) -> None:
        self.allow_empty = allow_empty
        self.num_sets = check_int("num_sets", num_sets)
        self.num_center_lines = num_center_lines
        self.max_center_lines = max_center_lines
        self.method = check_choice("method", method, ("low_frequency", "espirit"))
        if method == "espirit" and num_center_lines is not None:
            raise ValueError("`num_center_lines` must be None for method 'espirit', which finds its central block.")
        if method != "espirit" and self.num_sets > 1:
            raise ValueError("Only the method 'espirit' finds several map sets. Take it, or `num_sets` 1.")

    def __call__(self, kspace: Tensor, mask: Tensor | None = None) -> Tensor:
        """Estimate maps.

        Args:
            kspace: complex, shape ``(K, *space)``.
            mask: shape ``(1, 1, W)`` in 2-D; None infers it.

        Returns:
            Complex, dimensionless, shape ``(K, *space)``, or ``(M, K, *space)`` for several map sets; ones for a
            single coil.
        """
        check_kspace(kspace)
        num_sets = min(self.num_sets, len(kspace))  # a single coil has one
        if self.allow_empty and not bool(kspace.any()):
            maps = torch.full_like(kspace, len(kspace) ** -0.5)
            return maps if num_sets == 1 else maps.expand(num_sets, *maps.shape).clone()
        batch = None if mask is None else mask.unsqueeze(0)
        spatial_dims = kspace.ndim - 1
        if self.method == "espirit":
            return espirit_maps(
                kspace.unsqueeze(0),
                batch,
                num_sets=num_sets,
                crop=0.0 if num_sets == 1 else _CROP_OF_SETS,
                max_center_lines=self.max_center_lines,
                spatial_dims=spatial_dims,
            )[0]
        return estimate_sensitivity_maps(
            kspace.unsqueeze(0),
            batch,
            num_center_lines=self.num_center_lines,
            max_center_lines=self.max_center_lines,
            spatial_dims=spatial_dims,
        )[0]


def _as_tuple(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
