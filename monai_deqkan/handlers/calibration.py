"""Calibrate a classifier at the end of its training, and note what its training images were like."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn
from torch.utils.data import Dataset

from monai_deqkan.handlers.best_model import replace_json, unwrapped
from monai_deqkan.metrics.calibration import choose_threshold, expected_calibration_error, fit_temperature
from monai_deqkan.metrics.training_range import image_statistics, training_ranges

__all__ = ["ClassificationCalibration"]


class ClassificationCalibration:
    """Add to the best model's ``model.json`` a temperature, a decision threshold, and the range of training images.

    When the training ends, early or not, the saved weights are run over all validation images. One temperature
    (:func:`~monai_deqkan.metrics.fit_temperature`) divides the logits from then on, and of two classes a threshold
    (:func:`~monai_deqkan.metrics.choose_threshold`) decides. Both stay near 1 and 0.5 where the images say
    little, and the log says when there are few. Scores on these same images are too good by it, if only a little.

    The ranges (:func:`~monai_deqkan.metrics.training_ranges`) tell inference which images are unlike those of the
    training. Of a large training set ``max_images`` chosen by chance are looked at.

    In distributed runs attach it in one process: it reads the data set itself, whole.

    Args:
        save_dir: folder with ``model.pt`` and ``model.json`` of :class:`BestModelSaver`.
        network: the network that was trained; it is left as it is.
        val_dataset: validation items with ``image`` and ``label``, preprocessed.
        train_dataset: training items with ``image``, preprocessed but not augmented; None leaves the ranges out.
        batch_size: number of images in one forward pass.
        max_images: number of training images to look at.
        seed: seed of their choice.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        network: nn.Module,
        val_dataset: Dataset[Any],
        train_dataset: Dataset[Any] | None = None,
        batch_size: int = 32,
        max_images: int = 1000,
        seed: int = 0,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.network = network
        self.val_dataset = val_dataset
        self.train_dataset = train_dataset
        self.batch_size = batch_size
        self.max_images = max_images
        self.seed = seed
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.COMPLETED, self._calibrate)

    def _calibrate(self, engine: Engine) -> None:
        description = self.save_dir / "model.json"
        if not description.is_file():
            self.logger.warning("No model was saved in %s: nothing to calibrate.", self.save_dir)
            return
        record = json.loads(description.read_text(encoding="utf-8"))
        logits, labels = self._validation_logits()
        found = calibrate_classifier(logits, labels)
        record |= found
        if self.train_dataset is not None:
            record["training_ranges"] = training_ranges(self._training_statistics())
        replace_json(description, record)
        numbers = found["calibration"]
        self.logger.info(
            "Calibrated on %d validation images (%d of the rarest class): temperature %.3f, %sexpected calibration "
            "error %.3f to %.3f.",
            numbers["num_images"],
            numbers["num_rarest"],
            found["temperature"],
            f"threshold {found['threshold']:.3f}, " if "threshold" in found else "",
            numbers["ece_before"],
            numbers["ece_after"],
        )
        if numbers["num_rarest"] < 20:
            self.logger.warning(
                "With so few validation images temperature and threshold are uncertain, though kept near 1 and 0.5 "
                "where they say little. Add data to `val`."
            )

    def _validation_logits(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        network = copy.deepcopy(unwrapped(self.network))
        network.load_state_dict(torch.load(self.save_dir / "model.pt", map_location="cpu", weights_only=True))
        network.eval()
        device = next(network.parameters()).device
        logits, labels = [], []
        with torch.no_grad():
            for batch in DataLoader(self.val_dataset, batch_size=self.batch_size):
                logits.append(network(torch.as_tensor(batch["image"]).to(device)).as_subclass(torch.Tensor).cpu())
                labels.append(torch.as_tensor(batch["label"]).flatten())
        return torch.cat(logits).double().numpy(), torch.cat(labels).long().numpy()

    def _training_statistics(self) -> list[dict[str, float]]:
        data: Any = self.train_dataset
        chosen: Sequence[int] = range(len(data))
        if len(data) > self.max_images:
            chosen = sorted(np.random.default_rng(self.seed).choice(len(data), self.max_images, replace=False).tolist())
        images = (data[index]["image"] for index in chosen)
        return [image_statistics(image, image.meta.get("spatial_shape")) for image in images]


def calibrate_classifier(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> Mapping[str, Any]:
    """Return the temperature, of two classes the threshold, and how they were found.

    Args:
        logits: of the validation images, shape ``(N, C)``.
        labels: their classes, shape ``(N,)``.
    """
    temperature = fit_temperature(logits, labels)
    before, after = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    found: dict[str, Any] = {"temperature": round(temperature, 6)}
    if logits.shape[1] == 2:
        found["threshold"] = round(choose_threshold(labels, after), 6)
    found["calibration"] = {
        "num_images": len(labels),
        "num_rarest": int(np.bincount(labels, minlength=logits.shape[1]).min()),
        "ece_before": expected_calibration_error(labels, before),
        "ece_after": expected_calibration_error(labels, after),
    }
    return found
