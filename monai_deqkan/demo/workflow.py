"""Run a bundle's configurations through MONAI's own workflow class; there is no second training path."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from monai_deqkan.data import copy_bundle

__all__ = ["BundleRun", "read_history"]


class BundleRun:
    """One bundle, copied to a folder, trained and used there.

    Args:
        name: name of the bundle.
        folder: where the copy, its models and its outputs go; absent or empty.
        dataset_dir: its data.
        settings: settings of the training that differ from the bundle's own, by id.
    """

    def __init__(self, name: str, folder: Path, dataset_dir: Path, settings: Mapping[str, Any]) -> None:
        self.folder = copy_bundle(name, folder)
        self.dataset_dir = dataset_dir
        self.settings = dict(settings)
        self.seconds: dict[str, float] = {}

    def train(self) -> dict[str, list[tuple[int, float]]]:
        """Train; return the learning curves."""
        self._run("train", "train", **self.settings)
        return read_history(self.folder / "logs" / "history.csv")

    def evaluate(self) -> tuple[dict[str, Any], ConfigWorkflow]:
        """Evaluate on the test part; return the metrics, and the workflow with the loaded network."""
        workflow = self._run("evaluate", "train")
        return json.loads((self.folder / "eval" / "metrics.json").read_text(encoding="utf-8")), workflow

    def infer(self, folder: Path) -> Path:
        """Run inference on a folder; return the folder of the results."""
        self._run("inference", "infer", dataset_dir=str(folder))
        return self.folder / "predictions"

    def _run(self, config: str, workflow_type: str, **overrides: Any) -> ConfigWorkflow:
        start = time.perf_counter()
        # The bundle's logging.conf is for runs of their own; here the progress bars say enough.
        logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
        workflow = ConfigWorkflow(
            config_file=str(self.folder / "configs" / f"{config}.json"),
            workflow_type=workflow_type,
            logging_file=False,
            **{"bundle_root": str(self.folder), "dataset_dir": str(self.dataset_dir), **overrides},
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        self.seconds[config] = round(time.perf_counter() - start, 1)
        return workflow


def read_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the learning curves that a training's ``HistoryWriter`` wrote: name to pairs of epoch and value."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "epoch" and value:
                    curves.setdefault(name, []).append((int(float(row["epoch"])), float(value)))
    return curves
