"""The slices of a volume side by side in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from skimage.util import montage

__all__ = ["slice_sheet"]

_COLUMNS, _LARGEST = 5, 320  # slices in a row; small ones are enlarged by whole factors up to so many pixels
_LINE = 16  # height of a line of text in pixels


def slice_sheet(volume: NDArray[np.floating], labels: Sequence[str], note: str) -> Image.Image:
    """Draw slices with one window, from zero to the 99.5th percentile of all.

    Args:
        volume: magnitudes ``(slices, H, W)``, any unit.
        labels: a few words for each slice.
        note: what is written below.
    """
    top = float(np.quantile(volume, 0.995)) or 1.0
    grey = np.round(255 * np.clip(volume / top, 0.0, 1.0)).astype(np.uint8)
    factor = max(1, _LARGEST // max(grey.shape[1:]))
    labelled = np.pad(grey.repeat(factor, 1).repeat(factor, 2), ((0, 0), (_LINE, 0), (0, 0)))
    columns = min(_COLUMNS, len(grey))
    pictures = montage(labelled, fill=0, grid_shape=(math.ceil(len(grey) / columns), columns))
    sheet = Image.fromarray(np.pad(pictures, ((0, _LINE), (0, 0))))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, label in enumerate(labels):
        row, column = divmod(place, columns)
        draw.text((column * labelled.shape[2] + 2, row * labelled.shape[1] + 2), label, fill=255, font=font)
    draw.text((2, sheet.height - _LINE + 2), note, fill=255, font=font)
    return sheet
