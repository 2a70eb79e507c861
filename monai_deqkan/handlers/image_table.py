"""Per-image scores of a segmentation as a CSV, and their means."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data.utils import affine_to_spacing
from monai.metrics import (
    compute_average_surface_distance,
    compute_confusion_matrix_metric,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    get_confusion_matrix,
)
from torch import Tensor

from monai_deqkan.handlers.table import image_name, write_table

__all__ = ["ImageTable"]

_NAMES = ("dice", "iou", "sensitivity", "precision", "hd95", "surface_distance")
_DISTANCES = ("hd95", "surface_distance")


class ImageTable:
    """Write ``images.csv``: the scores of each image and foreground class, by MONAI's metrics.

    Columns ``<score>_<class>``: Dice; intersection over union; sensitivity; precision; the 95th percentile of the
    Hausdorff distance (``hd95``); and the mean distance of the two surfaces, symmetric (``surface_distance``). A cell
    is empty where its score does not exist: all of them where the class is in neither mask; sensitivity where the
    reference lacks it; precision where the prediction does; distances where either does. Dice and intersection are 0
    where one mask has the class and the other has not. Means leave empty cells out: a class that is missed altogether
    shows in Dice and sensitivity, not in distances.

    Distances are in the unit of the file, ``distance_unit``: mm where the file knows its spacing (NIfTI, DICOM and
    alike), else pixels of the file, also where the network sees a smaller image.

    The means over images enter the engine's metrics as ``val_<score>_<class>``, those over images and classes of all
    scores but Dice and intersection, which MONAI's handlers give, as ``val_<score>``; so attach
    :class:`MetricsWriter` after this. Images are named by their path below ``dataset_dir``; nothing from a file's
    header is written but the unit.

    Args:
        output_dir: folder of the table; made where absent.
        dataset_dir: folder that image paths are written relative to.
        columns: names of the classes, background first.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], dataset_dir: str | os.PathLike[str], columns: Sequence[str]
    ) -> None:
        self.path = Path(output_dir) / "images.csv"
        self.dataset_dir = Path(dataset_dir)
        self.columns = list(columns)[1:]
        self.rows: list[dict[str, Any]] = []
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``image`` and one-hot ``pred`` and ``label``."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Any) -> None:
        for sample in engine.state.output:
            spacing, unit = pixel_spacing(sample["image"])
            scores = segmentation_scores(sample["pred"], sample["label"], spacing)
            row: dict[str, Any] = {"image": image_name(sample, self.dataset_dir)}
            for name, values in scores.items():
                row |= {f"{name}_{label}": value for label, value in zip(self.columns, values, strict=True)}
            self.rows.append({**row, "distance_unit": unit})

    def _write(self, engine: Any) -> None:
        header = [*(f"{name}_{label}" for name in _NAMES for label in self.columns)]
        rows = [[row["image"], *(_cell(row[name]) for name in header), row["distance_unit"]] for row in self.rows]
        write_table(self.path, ["image", *header, "distance_unit"], rows)
        for name in _NAMES:
            for label in self.columns:
                engine.state.metrics[f"val_{name}_{label}"] = _mean([row[f"{name}_{label}"] for row in self.rows])
            if name not in ("dice", "iou"):
                found = [row[f"{name}_{label}"] for row in self.rows for label in self.columns]
                engine.state.metrics[f"val_{name}"] = _mean(found)
        units = {row["distance_unit"] for row in self.rows}
        if len(units) > 1:
            self.logger.warning("Some distances are in mm, some in pixels: their means mix both. See %s.", self.path)


def segmentation_scores(prediction: Tensor, reference: Tensor, spacing: Sequence[float]) -> dict[str, list[float]]:
    """Return the scores of one image per foreground class, NaN where one does not exist; see :class:`ImageTable`.

    Args:
        prediction: one-hot mask ``(C, *space)``, background first.
        reference: one-hot mask, as ``prediction``.
        spacing: distance of neighboring pixels along each axis.
    """
    y_pred, y = plain_batch(prediction), plain_batch(reference)
    matrix = get_confusion_matrix(y_pred, y, include_background=False)  # (1, C - 1, 4)
    scores = {
        "dice": compute_dice(y_pred, y, include_background=False, ignore_empty=False),
        "iou": compute_iou(y_pred, y, include_background=False, ignore_empty=False),
        "sensitivity": compute_confusion_matrix_metric("sensitivity", matrix),
        "precision": compute_confusion_matrix_metric("precision", matrix),
    }
    table = {name: values.flatten().tolist() for name, values in scores.items()}
    table |= {name: [] for name in _DISTANCES}
    true_positives, false_positives, _, false_negatives = matrix[0].unbind(1)
    predicted, present = true_positives + false_positives > 0, true_positives + false_negatives > 0
    for index, (has_prediction, has_reference) in enumerate(zip(predicted.tolist(), present.tolist(), strict=True)):
        if not (has_prediction or has_reference):
            table["dice"][index] = table["iou"][index] = math.nan
        hd95 = mean = math.nan
        if has_prediction and has_reference:  # else MONAI would warn, and give infinity
            pair = y_pred[:, index + 1 : index + 2], y[:, index + 1 : index + 2]
            step = list(spacing)
            hd95 = float(compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=step))
            mean = float(compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=step))
        table["hd95"].append(hd95)
        table["surface_distance"].append(mean)
    return table


def pixel_spacing(image: Any) -> tuple[list[float], str]:
    """Return the distance of neighboring pixels of a loaded image along each axis, and its unit."""
    rank = image.ndim - 1
    spacing = [float(value) for value in affine_to_spacing(torch.as_tensor(image.affine), r=rank)]
    known = not bool(torch.allclose(torch.as_tensor(image.meta["original_affine"]).abs(), torch.eye(4).double()))
    name = str(image.meta["filename_or_obj"]).lower()
    return spacing, "mm" if known or name.endswith((".nii", ".nii.gz")) else "pixel"


def _mean(values: Sequence[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def plain_batch(mask: Tensor) -> Tensor:
    """Return a mask as a batch of one on the CPU."""
    # Plain tensors: metrics on those with geometry are slow.
    return torch.as_tensor(mask).detach().cpu().as_subclass(Tensor)[None].float()
