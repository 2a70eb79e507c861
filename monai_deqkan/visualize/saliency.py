"""A map of what mattered to a network, over its image."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from monai_deqkan._checks import check_range
from monai_deqkan.visualize.learning import as_array

__all__ = ["overlay_saliency"]


def overlay_saliency(
    image: ArrayLike | Tensor, saliency: ArrayLike | Tensor, *, opacity: float = 0.6
) -> NDArray[np.uint8]:
    """Lay a saliency map over an image, from transparent (no weight) over red to yellow (the most weight).

    Args:
        image: shape ``(C, H, W)`` with 1 or 3 channels, intensities in ``[0, 1]``; others are clipped.
        saliency: shape ``(H, W)``, any unit, not negative; scaled by its largest value.
        opacity: of the map where it is largest, in ``[0, 1]``.

    Returns:
        Colors, shape ``(H, W, 3)``.

    Raises:
        ValueError: if shapes do not fit together, or values are not finite.

    Example:
        >>> overlay_saliency([[[0.0, 1.0]]], [[0.0, 0.0]]).tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    from monai.visualize.utils import blend_images

    picture, weight = as_array("image", image, 3).astype(float), as_array("saliency", saliency, 2).astype(float)
    check_range("opacity", opacity, 0.0, 1.0)
    if picture.shape[1:] != weight.shape or picture.shape[0] not in (1, 3):
        raise ValueError(
            "`image` must have shape (1 or 3, H, W) with the H and W of `saliency`; got "
            f"{picture.shape} and {weight.shape}."
        )
    heat = np.clip(weight, 0, None) / max(float(weight.max()), 1e-12)
    blended = blend_images(
        np.clip(picture, 0, 1), heat[None], alpha=opacity * heat[None], cmap="autumn", rescale_arrays=False
    )
    return np.moveaxis(np.round(255 * np.clip(np.asarray(blended), 0, 1)), 0, -1).astype(np.uint8)
