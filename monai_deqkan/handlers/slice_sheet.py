"""The slices of a volume side by side in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

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
    height, width = (factor * size for size in grey.shape[1:])
    columns = min(_COLUMNS, len(grey))
    rows = math.ceil(len(grey) / columns)
    sheet = Image.new("L", (columns * width, rows * (height + _LINE) + _LINE))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (picture, label) in enumerate(zip(grey, labels, strict=True)):
        left, upper = place % columns * width, place // columns * (height + _LINE)
        draw.text((left + 2, upper + 2), label, fill=255, font=font)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, upper + _LINE))
    draw.text((2, sheet.height - _LINE + 2), note, fill=255, font=font)
    return sheet
