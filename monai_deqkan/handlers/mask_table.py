"""What inference found in each image, as CSV and JSON."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from monai_deqkan.handlers.table import image_name, write_table
from monai_deqkan.handlers.training_ranges import rescaled_statistics
from monai_deqkan.metrics.training_range import outside_training

__all__ = ["MaskTable"]

logger = logging.getLogger(__name__)


class MaskTable:
    """Write ``masks.csv`` and ``masks.json``: image, mask file, and what each class covers.

    ``share_<class>`` is the part of the image's pixels, dimensionless; ``ml_<class>`` in volumes the volume by the
    file's voxel size. ``unlike_training`` names the statistics of the image that lie outside the range of the training
    images, see :func:`~monai_deqkan.metrics.image_statistics`. Images are named by their path below ``dataset_dir``,
    masks by theirs below ``output_dir``; nothing from a file's header is written.

    Args:
        output_dir: folder of the files; made where absent.
        class_names: names of the classes, background first.
        dataset_dir: folder that image paths are written relative to.
        training_ranges: ranges of the training images' statistics, from the model's description.
        skipped: files that could not be read, with ``file`` and ``reason``, listed in the JSON file.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        class_names: Sequence[str],
        dataset_dir: str | os.PathLike[str],
        training_ranges: Mapping[str, Sequence[float]] | None = None,
        skipped: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.output_dir = Path(output_dir)
        self.class_names = list(class_names)
        self.dataset_dir = Path(dataset_dir)
        self.training_ranges = dict(training_ranges or {})
        self.skipped = [dict(entry) for entry in skipped]
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``image``, preprocessed, and ``pred``, written class indices."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Any) -> None:
        for sample in engine.state.output:
            mask = sample["pred"]
            counts = torch.bincount(mask.as_tensor().long().flatten().cpu(), minlength=len(self.class_names)).tolist()
            row: dict[str, Any] = {"image": image_name(sample, self.dataset_dir)}
            if "mask_file" in mask.meta:
                row["mask"] = Path(os.path.relpath(mask.meta["mask_file"], self.output_dir)).as_posix()
            for name, count in list(zip(self.class_names, counts, strict=True))[1:]:
                row[f"share_{name}"] = count / mask.numel()
                if mask.ndim == 4:
                    row[f"ml_{name}"] = count * _voxel_ml(mask.affine)
            if self.training_ranges:
                row["unlike_training"] = outside_training(rescaled_statistics(sample["image"]), self.training_ranges)
            self.rows.append(row)

    def _write(self, engine: Engine) -> None:
        header = list(dict.fromkeys(name for row in self.rows for name in row)) or ["image"]
        write_table(
            self.output_dir / "masks.csv", header, [[_cell(row.get(name)) for name in header] for row in self.rows]
        )
        record = {
            "notice": "Research only; not for clinical use.",
            "class_names": self.class_names,
            "images": self.rows,
            "skipped": self.skipped,
        }
        (self.output_dir / "masks.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unlike = sum(bool(row.get("unlike_training")) for row in self.rows)
        if unlike:
            text = "%d of %d images are unlike the training images: do not rely on their masks; see masks.csv."
            logger.warning(text, unlike, len(self.rows))


def _voxel_ml(affine: Tensor) -> float:
    return float(torch.linalg.det(affine[:3, :3].double()).abs()) / 1000  # mm^3 to ml


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(value)
    return f"{value:.6g}" if isinstance(value, float) else value
