"""Dictionary forms of the k-space transforms.

A training item starts as ``{"kspace": path, "slice": index}``. After :class:`LoadKspaceSliced`,
``CropCoilImagesd`` (optional), MONAI's ``CopyItemsd`` (the full k-space, under a key of its own),
:class:`UndersampleKspaced`, :class:`EstimateSensitivityMapsd`, :class:`ReferenceImaged` (of the copy, with
``maps_key="sensitivity_maps"``), ``DeleteItemsd`` (the copy) and :class:`NormalizeKspaced` it holds

========================  ======================================  ===========================================
key                       tensor                                  what
========================  ======================================  ===========================================
``kspace``                complex64 ``(K, H, W)``                 undersampled, normalized
``mask``                  bool ``(1, 1, W)``                      measured columns
``sensitivity_maps``      complex64 ``(K, H, W)``                 from the undersampled centre
``image``                 float32 ``(2, H, W)``                   target: full data combined with these maps
``reference_rss``         float32 ``(1, H, W)``                   root sum of squares of the full data
``scale``                 float32 scalar                          times it, all of them have the file's unit
``source``, ``slice``     str, int                                file and slice they come from
========================  ======================================  ===========================================

``kspace``, ``image`` and ``reference_rss`` share one scale. For inference leave out the reference and, for data that
were measured undersampled, the undersampling: networks infer the mask.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.operators import infer_mask
from monai_deqkan.transforms.kspace.array import (
    EstimateSensitivityMaps,
    LoadKspaceSlice,
    MaskKspace,
    NormalizeKspace,
    ReferenceImage,
    UndersampleKspace,
)
from monai_deqkan.transforms.kspace.checks import item_seed_of, one_key

__all__ = [
    "EstimateSensitivityMapsd",
    "LoadKspaceSliced",
    "MaskKspaced",
    "NormalizeKspaced",
    "ReferenceImaged",
    "UndersampleKspaced",
]

Item = dict[Hashable, Any]

logger = logging.getLogger(__name__)


class LoadKspaceSliced(MapTransform):
    """Replace a path by the k-space of one slice; see :class:`LoadKspaceSlice`.

    Args:
        keys: keys of paths, such as ``"kspace"``.
        slice_key: key of the slice's index.
        source_key: key under which the path is kept.
        allow_missing_keys: whether to skip absent keys.
        allow_broken: whether a slice with values that are not finite is loaded as zeros, with a line in the log;
            ``"broken"`` then says of each slice whether it was one. Otherwise it is an error.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        slice_key: str = "slice",
        source_key: str = "source",
        allow_missing_keys: bool = False,
        *,
        allow_broken: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.slice_key = slice_key
        self.source_key = source_key
        self.allow_broken = allow_broken
        self.load = LoadKspaceSlice(check=not allow_broken)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Load the slice."""
        item = dict(data)
        if self.slice_key not in item:
            raise KeyError(f"An item must name its slice under '{self.slice_key}'; it has {sorted(map(str, item))}.")
        for key in self.key_iterator(item):
            path = item[key]
            item[key] = self.load(path, item[self.slice_key])
            item[self.source_key] = str(path)
            broken = self.allow_broken and not bool(item[key].isfinite().all())
            if self.allow_broken:
                item["broken"] = broken or bool(item.get("broken"))
            if broken:
                logger.warning("Slice %s of %s holds NaN or infinite values: left out.", item[self.slice_key], path)
                item[key] = torch.zeros_like(item[key])
        return item


class ReferenceImaged(MapTransform):
    """Add the reference image of fully sampled k-space; see :class:`ReferenceImage`.

    Args:
        keys: key of k-space, one.
        image_key: key for the SENSE combination.
        rss_key: key for the root sum of squares.
        maps_key: key of coil maps to combine with, such as those that the network will be given: then the target's
            phase is one that it can reach. None estimates maps from the full data.
        num_center_lines: see :class:`ReferenceImage`.
        allow_missing_keys: whether to skip an absent key.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        image_key: str = "image",
        rss_key: str = "reference_rss",
        maps_key: str | None = None,
        num_center_lines: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(one_key(keys), allow_missing_keys)
        self.image_key = image_key
        self.rss_key = rss_key
        self.maps_key = maps_key
        self.combine = ReferenceImage(num_center_lines)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Add the references."""
        item = dict(data)
        for key in self.key_iterator(item):
            maps = None if self.maps_key is None else item[self.maps_key]
            item[self.image_key], item[self.rss_key] = self.combine(item[key], maps)
        return item


class UndersampleKspaced(RandomizableTransform, MapTransform):
    """Undersample k-space and add the mask; see :class:`UndersampleKspace`.

    Args:
        keys: key of k-space, one.
        mask_key: key for the mask.
        accelerations: see :class:`UndersampleKspace`.
        center_fractions: see :class:`UndersampleKspace`.
        pattern: see :class:`UndersampleKspace`.
        item_seed: None draws a new mask in every call, for training. A number gives every slice one mask for ever, made
            from this seed, the file's name and the slice, for validation.
        source_key: key of the file's path, as set by :class:`LoadKspaceSliced`; used with ``item_seed``.
        slice_key: key of the slice's index; used with ``item_seed``.
        allow_missing_keys: whether to skip an absent key.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        mask_key: str = "mask",
        accelerations: float | Sequence[float] = 4.0,
        center_fractions: float | Sequence[float] = 0.08,
        pattern: str | Sequence[str] = "equispaced",
        *,
        item_seed: int | None = None,
        source_key: str = "source",
        slice_key: str = "slice",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, one_key(keys), allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.mask_key = mask_key
        self.item_seed = None if item_seed is None else check_int("item_seed", item_seed, minimum=0)
        self.source_key = source_key
        self.slice_key = slice_key
        self.undersample = UndersampleKspace(accelerations, center_fractions, pattern=pattern)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> UndersampleKspaced:
        """Seed the masks that are drawn per call."""
        super().set_random_state(seed, state)
        self.undersample.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Undersample."""
        item = dict(data)
        for key in self.key_iterator(item):
            seed = item_seed_of(item, self.item_seed, self.source_key, self.slice_key)
            item[key], item[self.mask_key] = self.undersample(item[key], seed)
        return item


class MaskKspaced(MapTransform):
    """Undersample k-space by a given mask; see :class:`MaskKspace`.

    Args:
        keys: key of k-space, one.
        mask: one mask for all items; None takes each item's own, under ``mask_key``.
        mask_key: key of the item's mask, and of the mask in the result.
        allow_missing_keys: whether to skip an absent key.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        mask: Tensor | np.ndarray | None = None,
        mask_key: str = "mask",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(one_key(keys), allow_missing_keys)
        self.mask_key = mask_key
        self.apply_mask = MaskKspace(mask)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Undersample."""
        item = dict(data)
        for key in self.key_iterator(item):
            own = item.get(self.mask_key) if self.apply_mask.mask is None else None
            item[key], item[self.mask_key] = self.apply_mask(item[key], own)
        return item


class NormalizeKspaced(MapTransform):
    """Scale k-space, and what belongs to it by the same number; see :class:`NormalizeKspace`.

    Args:
        keys: key of the k-space that sets the scale, one.
        also: keys of other tensors in the same unit that are divided by the same scale; absent ones are skipped.
        scale_key: key for the scale.
        percentile: see :class:`NormalizeKspace`.
        allow_empty: see :class:`NormalizeKspace`.
        allow_missing_keys: whether to skip an absent key.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        also: Sequence[str] = ("image", "reference_rss"),
        scale_key: str = "scale",
        percentile: float = 99.0,
        allow_empty: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(one_key(keys), allow_missing_keys)
        self.also = tuple(also)
        self.scale_key = scale_key
        self.normalize = NormalizeKspace(percentile, allow_empty)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Scale."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key], scale = self.normalize(item[key])
            item[self.scale_key] = scale
            for other in self.also:
                if other in item:
                    item[other] = item[other] / scale
        return item


class EstimateSensitivityMapsd(MapTransform):
    """Add coil maps; see :class:`EstimateSensitivityMaps`.

    Args:
        keys: key of k-space, one.
        mask_key: key of the mask; where it is absent, the mask is inferred.
        maps_key: key for the maps.
        num_center_lines: see :class:`EstimateSensitivityMaps`.
        max_center_lines: see :class:`EstimateSensitivityMaps`.
        method: see :class:`EstimateSensitivityMaps`.
        allow_missing_keys: whether to skip an absent key.
        replace: whether maps that the item has already are replaced.
        allow_empty: see :class:`EstimateSensitivityMaps`. An item without a mask then gets one, all ones for an empty
            slice, so that nothing later has to infer it.
        num_sets: see :class:`EstimateSensitivityMaps`.
    """

    def __init__(
        self,
        keys: KeysCollection = "kspace",
        mask_key: str = "mask",
        maps_key: str = "sensitivity_maps",
        num_center_lines: int | None = None,
        max_center_lines: int = 24,
        method: str = "low_frequency",
        allow_missing_keys: bool = False,
        *,
        replace: bool = True,
        allow_empty: bool = False,
        num_sets: int = 1,
    ) -> None:
        super().__init__(one_key(keys), allow_missing_keys)
        self.replace = replace
        self.mask_key = mask_key
        self.maps_key = maps_key
        self.estimate = EstimateSensitivityMaps(num_center_lines, max_center_lines, method, allow_empty, num_sets)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Add the maps."""
        item = dict(data)
        for key in self.key_iterator(item):
            if self.maps_key in item and not self.replace:
                continue
            if self.estimate.allow_empty and self.mask_key not in item:
                item[self.mask_key] = _mask_of(item[key])
            item[self.maps_key] = self.estimate(item[key], item.get(self.mask_key))
        return item


def _mask_of(kspace: Tensor) -> Tensor:
    """Return the mask of what is not zero, or of everything where all is zero."""
    shown = kspace if bool(kspace.any()) else torch.ones_like(kspace)
    return infer_mask(shown[None], spatial_dims=kspace.ndim - 1)[0]
