"""Note at the end of a training what its images were like, so that inference can tell unlike ones."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRangePercentiles
from monai.utils import TraceKeys
from torch import Tensor
from torch.utils.data import Dataset

from monai_deqkan.handlers.best_model import replace_json
from monai_deqkan.metrics.training_range import image_statistics, training_ranges

__all__ = ["TrainingRangeWriter", "rescaled_statistics"]

logger = logging.getLogger(__name__)

_FEWEST = 20  # ranges of fewer images are so narrow that they call ordinary images unlike: 8 volumes did
# Images are padded to the network's shape: portrait radiographs (35 x 43 cm, logarithm 0.21) go beside square ones.
_SHAPE_SLACK = 0.25


class TrainingRangeWriter:
    """Add to the best model's ``model.json`` the range of the training images' statistics, when the training ends.

    The ranges (:func:`~monai_deqkan.metrics.training_ranges`) are those of preprocessed images, of any intensity scale:
    each is first freed of its padding and mapped to ``[0, 1]``, from its minimum to its 99.5th percentile. Of a large
    training set ``max_images`` chosen by chance are looked at; from fewer than 20 no range can be told, and none is
    written.

    Args:
        save_dir: folder with the ``model.json`` of :class:`BestModelSaver`.
        dataset: training items with ``image``, preprocessed but not augmented.
        max_images: number of images to look at.
        seed: seed of their choice.
        describe: maps an item to its statistics; None takes those of its ``image``. For k-space:
            ``lambda item: kspace_statistics(item["kspace"], item["mask"])``.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        dataset: Dataset[Any],
        max_images: int = 500,
        seed: int = 0,
        describe: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.dataset = dataset
        self.max_images = max_images
        self.seed = seed
        self.describe = _image_statistics if describe is None else describe

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        description = self.save_dir / "model.json"
        if not description.is_file():
            logger.warning("No model was saved in %s: no ranges to add.", self.save_dir)
            return
        data: Any = self.dataset
        count = len(data)
        if count < _FEWEST:
            logger.info("Too few training images (%d) to tell later which images are unlike them.", count)
            return
        chosen = np.random.default_rng(self.seed).choice(count, min(count, self.max_images), replace=False)
        items = (data[int(index)] for index in sorted(chosen))
        # Crops of MONAI give a list of samples.
        statistics = [self.describe(item[0] if isinstance(item, list) else item) for item in items]
        ranges = training_ranges(statistics, shape_slack=_SHAPE_SLACK)
        record = json.loads(description.read_text(encoding="utf-8"))
        replace_json(description, {**record, "training_ranges": ranges})


def _image_statistics(item: Mapping[str, Any]) -> dict[str, float]:
    return rescaled_statistics(item["image"])


def rescaled_statistics(image: Any) -> dict[str, float]:
    """Describe a preprocessed image of any intensity scale, without its padding; see :class:`TrainingRangeWriter`."""
    pixels = _without_padding(image).detach().cpu()
    scale = ScaleIntensityRangePercentiles(0, 99.5, 0.0, 1.0, clip=True)
    scaled = scale(pixels) if bool(pixels.max() > pixels.min()) else torch.zeros_like(pixels)
    return image_statistics(torch.as_tensor(scaled), image.meta.get("spatial_shape"))


def _without_padding(image: MetaTensor) -> Tensor:
    """Return the pixels without those that a MONAI transform padded last: they are no part of what the image is like.

    Otherwise an image is unlike all others only because it is not as square as they are.
    """
    pixels = image.as_subclass(Tensor)
    last = image.applied_operations[-1] if image.applied_operations else {}
    extra = last.get(TraceKeys.EXTRA_INFO, {})
    padded = extra.get("pad_info", {}).get(TraceKeys.EXTRA_INFO, extra).get("padded", ())
    if len(padded) != pixels.ndim:
        return pixels
    return pixels[
        tuple(slice(int(low), size - int(high)) for size, (low, high) in zip(pixels.shape, padded, strict=True))
    ]
