"""The worst images of a segmentation as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_dice
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.handlers.image_table import plain_batch
from monai_deqkan.handlers.table import image_name
from monai_deqkan.visualize.mask_outlines import upright_slice
from monai_deqkan.visualize.segmentation import plot_segmentation

__all__ = ["WorstCases"]


class WorstCases:
    """Draw ``worst.png``: the images with the lowest Dice, worst first, with both masks and both outlines.

    An image's Dice is the mean over the foreground classes that are in either mask; images without any are passed
    over. Of a volume, which must be in RAS+ order, the axial slice with most wrong voxels is shown, the front up.
    Titles are paths below ``dataset_dir``.

    Args:
        output_dir: folder of the picture; made where absent.
        dataset_dir: folder that image paths are written relative to.
        class_names: names of the classes, background first.
        num_cases: number of images.

    Raises:
        ValueError: if ``num_cases`` is not positive.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        dataset_dir: str | os.PathLike[str],
        class_names: Sequence[str],
        num_cases: int = 6,
    ) -> None:
        self.path = Path(output_dir) / "worst.png"
        self.dataset_dir = Path(dataset_dir)
        self.class_names = list(class_names)
        self.num_cases = check_int("num_cases", num_cases)
        self.cases: list[tuple[float, str, np.ndarray, np.ndarray, np.ndarray]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``image`` and one-hot ``pred`` and ``label``."""
        engine.add_event_handler(Events.STARTED, lambda _: self.cases.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._draw)

    def _collect(self, engine: Any) -> None:
        for sample in engine.state.output:
            dice = _mean_dice(plain_batch(sample["pred"]), plain_batch(sample["label"]))
            if not math.isnan(dice):
                self.cases.append((dice, image_name(sample, self.dataset_dir), *_pictures(sample)))
        self.cases = sorted(self.cases, key=lambda case: case[:2])[: self.num_cases]

    def _draw(self, engine: Engine) -> None:
        if not self.cases:
            return
        scores, names, images, labels, predictions = zip(*self.cases, strict=True)
        titles = [f"Dice {score:.3f}\n{name}" for score, name in zip(scores, names, strict=True)]
        figure = plot_segmentation(
            images, labels, predictions, self.class_names, titles, outlines=True, title="Images with the lowest Dice"
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, dpi=100, metadata={"Software": None})


def _mean_dice(prediction: Tensor, reference: Tensor) -> float:
    """Return the mean over the foreground classes that either mask ``(1, C, *space)`` has; NaN without any."""
    dice = compute_dice(prediction, reference, include_background=False, ignore_empty=False)[0]
    present = (prediction + reference)[0, 1:].flatten(1).any(dim=1)
    return float(dice[present].mean())


def _pictures(sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the image, its reference and its prediction, each ``(H, W)``."""
    image = plain_batch(sample["image"])[0].mean(dim=0)
    reference, prediction = (plain_batch(sample[key])[0].argmax(dim=0) for key in ("label", "pred"))
    if image.ndim == 3:
        worst = int((reference != prediction).sum(dim=(0, 1)).argmax())
        spacing = np.sqrt((np.asarray(sample["image"].affine)[:3, :3] ** 2).sum(0))
        image, reference, prediction = (
            torch.from_numpy(upright_slice(volume.numpy(), 2, worst, spacing).T)
            for volume in (image, reference, prediction)
        )
    # Readers put a picture's columns first.
    return image.T.numpy(), reference.T.long().numpy(), prediction.T.long().numpy()
