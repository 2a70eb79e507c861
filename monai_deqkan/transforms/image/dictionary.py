"""Dictionary forms of the image readers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_deqkan.transforms.image.array import LoadMask, LoadMedicalImage

__all__ = ["LoadMaskd", "LoadMedicalImaged"]


class LoadMedicalImaged(MapTransform):
    """Read the image files under some keys; see :class:`LoadMedicalImage`.

    Args:
        keys: keys whose values are paths.
        spatial_dims: 2 or 3.
        channels: number of channels wanted.
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(
        self, keys: KeysCollection, spatial_dims: int = 2, channels: int = 1, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadMedicalImage(spatial_dims, channels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path by its image."""
        return {**data, **{key: self.load(data[key]) for key in self.key_iterator(data)}}


class LoadMaskd(MapTransform):
    """Read the label masks under some keys; see :class:`LoadMask`.

    Args:
        keys: keys whose values are paths.
        values: the distinct pixel values of all masks, sorted; the position of a value is its class.
        spatial_dims: 2 or 3.
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(
        self, keys: KeysCollection, values: Sequence[int], spatial_dims: int = 2, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadMask(values, spatial_dims)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path by its mask."""
        return {**data, **{key: self.load(data[key]) for key in self.key_iterator(data)}}
