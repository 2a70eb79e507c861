"""Predicted masks as outlines over their images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from monai_deqkan._checks import check_int
from monai_deqkan.handlers.table import image_name
from monai_deqkan.transforms import LoadMedicalImage
from monai_deqkan.visualize.mask_outlines import draw_outlines, upright_slice
from monai_deqkan.visualize.segmentation import class_color

__all__ = ["MaskOverlayWriter"]

_LEAST_SIZE = 256  # pixels that the longest axis of a volume is drawn with


class MaskOverlayWriter:
    """Write each image with the outlines of its predicted classes: ``overlays/<image>_overlay.png``.

    Each image is read again from its file, so that the picture has its own pixels. Of a volume three slices are drawn
    through the middle of what was found, from the left: axial, coronal, sagittal; front or top is up, and the patient's
    right is on the right. Small volumes are enlarged.

    Args:
        output_dir: folder of the pictures; made where absent.
        dataset_dir: folder that image paths are written relative to.
        channels: number of channels of the images.
        class_names: names of the classes, background first; two or more beside it are written below in their colors.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        dataset_dir: str | os.PathLike[str],
        channels: int = 1,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(output_dir) / "overlays"
        self.dataset_dir = Path(dataset_dir)
        self.channels = check_int("channels", channels)
        self.class_names = tuple(class_names or ())

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred``, class indices in the geometry of the file."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Any) -> None:
        for sample in engine.state.output:
            mask = sample["pred"]
            image = LoadMedicalImage(mask.ndim - 1, self.channels)(sample["image"].meta["filename_or_obj"])
            target = self.folder / f"{image_name(sample, self.dataset_dir)}_overlay.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            # Axis 0 of our images is x, in pictures it is y.
            picture = (
                draw_outlines(image.mean(0).numpy().T, mask[0].cpu().numpy().T.astype(int))
                if mask.ndim == 3
                else _three_slices(image, mask)
            )
            Image.fromarray(_with_legend(picture, self.class_names[1:])).save(target)


def _three_slices(image: MetaTensor, mask: MetaTensor) -> NDArray[np.uint8]:
    """Draw the slices through the middle of the foreground, side by side, pixels square."""
    turn = Orientation(axcodes="RAS", labels=None)
    turned: Any = turn(image)
    grey: NDArray[Any] = turned.mean(0).numpy()
    classes = np.asarray(turn(MetaTensor(mask.as_tensor().cpu().float(), affine=image.affine)))[0].astype(int)
    spacing = np.sqrt((np.asarray(turned.affine)[:3, :3] ** 2).sum(0))
    found = np.argwhere(classes > 0)
    center = found.mean(0).round().astype(int) if len(found) else np.array(classes.shape) // 2
    low, high = np.percentile(grey, (0.5, 99.5))
    zoom = math.ceil(_LEAST_SIZE / max(np.array(classes.shape) * spacing / spacing.min()))
    panels = []
    for axis in (2, 1, 0):
        picture, drawn = (upright_slice(volume, axis, center[axis], spacing, zoom) for volume in (grey, classes))
        panels.append(draw_outlines(picture, drawn, (low, high)))
    height = max(panel.shape[0] for panel in panels)
    return np.concatenate([np.pad(p, ((0, height - p.shape[0]), (0, 4), (0, 0))) for p in panels], axis=1)


def _with_legend(picture: NDArray[np.uint8], names: Sequence[str]) -> NDArray[np.uint8]:
    """Write names below, the first in the color of class 1, as many in a line as there is room for."""
    if len(names) < 2:  # one needs no telling apart, and the picture keeps the image's size
        return picture
    size = max(12, picture.shape[0] // 40)
    font = ImageFont.load_default(size)
    widths = [round(font.getlength(f"{name}  ")) for name in names]
    places, x, y = [], size // 2, 0
    for width in widths:
        if x > size // 2 and x + width > picture.shape[1]:
            x, y = size // 2, y + round(1.4 * size)
        places.append((x, y))
        x += width
    canvas = Image.new(
        "RGB", (max(picture.shape[1], size // 2 + max(widths)), picture.shape[0] + y + round(1.6 * size))
    )
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    for index, (name, (x, y)) in enumerate(zip(names, places, strict=True), start=1):
        draw.text((x, picture.shape[0] + y), name, fill=class_color(index), font=font)
    return np.asarray(canvas)
