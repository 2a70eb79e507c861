"""Predicted masks as outlines over their images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from numpy.typing import NDArray
from PIL import Image

from monai_deqkan._checks import check_int
from monai_deqkan.handlers.table import image_name
from monai_deqkan.transforms import LoadMedicalImage
from monai_deqkan.visualize.mask_outlines import draw_outlines

__all__ = ["MaskOverlayWriter"]


class MaskOverlayWriter:
    """Write each image with the outlines of its predicted classes: ``overlays/<image>_overlay.png``.

    Each image is read again from its file, so that the picture has its own pixels. Of a volume three slices are drawn
    through the middle of what was found, from the left: axial, coronal, sagittal; front or top is up, and the patient's
    right is on the right.

    Args:
        output_dir: folder of the pictures; made where absent.
        dataset_dir: folder that image paths are written relative to.
        channels: number of channels of the images.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], dataset_dir: str | os.PathLike[str], channels: int = 1
    ) -> None:
        self.folder = Path(output_dir) / "overlays"
        self.dataset_dir = Path(dataset_dir)
        self.channels = check_int("channels", channels)

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
            Image.fromarray(picture).save(target)


def _three_slices(image: MetaTensor, mask: MetaTensor) -> NDArray[np.uint8]:
    """Draw the slices through the middle of the foreground, side by side, pixels square."""
    turn = Orientation(axcodes="RAS", labels=None)
    turned: Any = turn(image)
    grey = turned.mean(0).numpy()
    classes = np.asarray(turn(MetaTensor(mask.as_tensor().cpu().float(), affine=image.affine)))[0].astype(int)
    spacing = np.sqrt((np.asarray(turned.affine)[:3, :3] ** 2).sum(0))
    found = np.argwhere(classes > 0)
    center = found.mean(0).round().astype(int) if len(found) else np.array(classes.shape) // 2
    low, high = np.percentile(grey, (0.5, 99.5))
    panels = []
    for axis in (2, 1, 0):
        picture = draw_outlines(
            np.rot90(grey.take(center[axis], axis)), np.rot90(classes.take(center[axis], axis)), (low, high)
        )
        across, up = np.delete(spacing, axis) / spacing.min()
        size = (round(picture.shape[1] * across), round(picture.shape[0] * up))
        panels.append(np.asarray(Image.fromarray(picture).resize(size)))
    height = max(panel.shape[0] for panel in panels)
    return np.concatenate([np.pad(p, ((0, height - p.shape[0]), (0, 4), (0, 0))) for p in panels], axis=1)
