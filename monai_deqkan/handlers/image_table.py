"""Per-image scores of an evaluation as a CSV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_dice
from torch import Tensor

from monai_deqkan.handlers.table import image_name, write_table

__all__ = ["ImageTable"]


class ImageTable:
    """Write ``images.csv``: the Dice of each image and foreground class; empty where a class is in neither mask.

    Images are named by their path below ``dataset_dir``; nothing from a file's header is written.

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
        self.rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has one-hot ``pred`` and ``label``."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Any) -> None:
        for sample in engine.state.output:
            dice = compute_dice(_batch(sample["pred"]), _batch(sample["label"]), include_background=False)[0].tolist()
            name = image_name(sample, self.dataset_dir)
            self.rows.append([name, *("" if value != value else f"{value:.4f}" for value in dice)])

    def _write(self, engine: Engine) -> None:
        write_table(self.path, ["image", *(f"dice_{name}" for name in self.columns)], self.rows)


def _batch(mask: Tensor) -> Tensor:
    return torch.as_tensor(mask).detach().cpu()[None]
