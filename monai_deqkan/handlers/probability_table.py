"""A CSV of class probabilities, one line per image."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from monai_deqkan.metrics.classification import decide

__all__ = ["ProbabilityTable"]


class ProbabilityTable:
    """Write ``predictions.csv``: image, one probability per class, predicted class, and the true one where known.

    Images are named by their path below ``dataset_dir``; nothing from a file's header is written.

    Args:
        output_dir: folder of the table; made where absent.
        class_names: names of the classes, in the order of the network's outputs.
        dataset_dir: folder that image paths are written relative to.
        threshold: see :func:`~monai_deqkan.metrics.decide`.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        class_names: Sequence[str],
        dataset_dir: str | os.PathLike[str],
        threshold: float = 0.5,
    ) -> None:
        self.path = Path(output_dir) / "predictions.csv"
        self.class_names = list(class_names)
        self.dataset_dir = Path(dataset_dir)
        self.threshold = threshold
        self.rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred`` as probabilities."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Any) -> None:
        for sample in engine.state.output:
            probabilities = torch.as_tensor(sample["pred"]).detach().cpu().flatten()
            index = int(decide(probabilities, self.threshold).argmax())
            label = sample.get("label")
            truth = [] if label is None else [self.class_names[_class_index(torch.as_tensor(label))]]
            name = os.path.relpath(sample["image"].meta["filename_or_obj"], self.dataset_dir)
            self.rows.append([name, *(f"{p:.6f}" for p in probabilities.tolist()), self.class_names[index], *truth])

    def _write(self, engine: Engine) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        labelled = bool(self.rows) and len(self.rows[0]) > len(self.class_names) + 2
        header = ["image", *(f"probability_{name}" for name in self.class_names), "prediction"]
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*header, "label"] if labelled else header)
            writer.writerows(self.rows)


def _class_index(label: torch.Tensor) -> int:
    """Return the class of a label that is an index or one-hot."""
    return int(label.argmax()) if label.numel() > 1 else int(label)
