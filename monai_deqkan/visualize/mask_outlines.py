"""Outlines of a mask over an image, pixel by pixel, and slices of volumes to draw them on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from monai_deqkan.visualize.learning import as_array
from monai_deqkan.visualize.segmentation import class_color

__all__ = ["draw_outlines"]


def draw_outlines(
    image: ArrayLike | Tensor, mask: ArrayLike | Tensor, limits: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Draw the outline of each foreground class over a grey image, one color for each.

    The lines lie inside of the classes; they are wider in larger images, one pixel for each 512.

    Args:
        image: shape ``(H, W)``, any unit.
        mask: class of each pixel, integers from 0, the background; shape ``(H, W)``.
        limits: intensities that are shown black and white; by default the 0.5th and 99.5th percentile.

    Returns:
        Colors, shape ``(H, W, 3)``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> draw_outlines([[0.0, 0.0, 1.0]], [[0, 0, 0]], (0.0, 1.0))[0, :, 0].tolist()
        [0, 0, 255]
    """
    from matplotlib.colors import to_rgb
    from skimage.segmentation import find_boundaries

    grey, classes = as_array("image", image, 2).astype(float), as_array("mask", mask, 2).astype(int)
    if grey.shape != classes.shape:
        raise ValueError(f"`image` and `mask` must have one shape; got {grey.shape} and {classes.shape}.")
    low, high = limits if limits is not None else np.percentile(grey, (0.5, 99.5))
    scaled = np.clip((grey - low) / max(high - low, 1e-12), 0, 1)
    picture = np.repeat(scaled[..., None], 3, axis=-1)
    for index in range(1, int(classes.max()) + 1):
        inside = classes == index
        for _ in range(max(1, round(max(grey.shape) / 512))):
            line = find_boundaries(inside, mode="inner")
            picture[line] = to_rgb(class_color(index))
            inside &= ~line
    return np.asarray(np.round(255 * picture), dtype=np.uint8)


def upright_slice(
    volume: NDArray[Any], axis: int, index: int, spacing: NDArray[Any], zoom: int = 1
) -> NDArray[np.float32]:
    """Cut a volume in RAS+ order, the patient's front or head up, its pixels repeated until they are square.

    Args:
        volume: ``(X, Y, Z)``.
        axis: the axis that is cut.
        index: place on it.
        spacing: of the voxels along the three axes.
        zoom: pixels of the picture for the smallest spacing.
    """
    across, up = zoom * np.delete(spacing, axis) / spacing.min()
    picture = np.rot90(volume.take(index, axis)).astype(np.float32)
    size = (round(picture.shape[1] * across), round(picture.shape[0] * up))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))
