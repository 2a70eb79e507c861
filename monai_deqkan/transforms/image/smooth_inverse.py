"""Make the way back to a file's size smooth."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import convert_applied_interp_mode

__all__ = ["SmoothInversed"]


class SmoothInversed(MapTransform):
    """Let MONAI's ``Invertd`` interpolate linearly, however the image was resized on its way to the network.

    By default the way back takes the mode of the way there. Averaging over areas, right for making an image smaller,
    makes blocks when probabilities are made larger again, so masks would have edges like stairs. Put it before
    ``Invertd``, for the key whose transforms are inverted.

    Args:
        keys: keys of preprocessed images.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the modes of the recorded transforms changed, in 2-D and 3-D.

        Raises:
            TypeError: if an image keeps no record of its transforms.
        """
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            if not isinstance(image, MetaTensor):
                raise TypeError(f"`{key}` must be a MetaTensor, which knows its transforms; got {type(image)}.")
            changed = MetaTensor(image.as_tensor(), meta=image.meta)
            changed.applied_operations = [_smooth(operation) for operation in image.applied_operations]
            result[key] = changed
        return result


def _smooth(operation: Mapping[str, Any]) -> Any:
    linear = "bilinear"
    if operation.get("class") == "Resize" and len(operation["orig_size"]) == 3:
        linear = "trilinear"  # torch names it by dimension for a new size, but not for sampling on a grid
    if operation.get("class") not in ("Resize", "SpatialResample", "Spacing", "Zoom", "Affine", "Rotate"):
        return operation
    return convert_applied_interp_mode(operation, mode=linear)
