"""An evaluation of a classifier as tables, pictures and one page."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.hooks import RemovableHandle

from monai_deqkan.handlers.best_model import unwrapped
from monai_deqkan.handlers.probability_table import ProbabilityTable
from monai_deqkan.handlers.table import write_table
from monai_deqkan.metrics.classification import Interval, bootstrap_intervals, classification_scores
from monai_deqkan.visualize.classification import plot_confusion_matrix, plot_precision_recall, plot_roc
from monai_deqkan.visualize.embedding import plot_embedding
from monai_deqkan.visualize.reliability import plot_reliability
from monai_deqkan.visualize.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassificationReport"]

_TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "Area under the ROC curve",
    "average_precision": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1 score",
    "ece": "Expected calibration error",
}
_BAND_RESAMPLES = 200
_NUM_MISTAKES = 10


class ClassificationReport:
    """Write what an evaluation found: ``report.html`` and what it is made of.

    ``predictions.csv`` and ``predictions.json`` (:class:`ProbabilityTable`), ``metrics.csv`` with 95 % intervals, and
    ``confusion_matrix.png``, ``roc.png``, ``precision_recall.png``, ``reliability.png``, ``features.png``. The scores
    (:func:`~monai_deqkan.metrics.classification_scores`) enter the engine's metrics as ``val_<name>``, their intervals
    as ``val_<name>_low`` and ``val_<name>_high``; so attach :class:`MetricsWriter` after this.

    Args:
        output_dir: folder of the files; made where absent.
        network: the classifier.
        class_names: names of the classes, in the order of the network's outputs.
        dataset_dir: folder that image paths are written relative to.
        threshold: see :func:`~monai_deqkan.metrics.decide`.
        temperature: by which logits were divided before; only told.
        training_ranges: see :class:`ProbabilityTable`.
        feature_layer: name of the module whose input is drawn as features; pictures of them are left out where it is
            None.
        num_resamples: number of bootstrap resamples of the intervals.
        seed: seed of the bootstrap and of the features' embedding.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        network: nn.Module,
        class_names: Sequence[str],
        dataset_dir: str | os.PathLike[str],
        threshold: float = 0.5,
        temperature: float = 1.0,
        training_ranges: Mapping[str, Sequence[float]] | None = None,
        feature_layer: str | None = "head",
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.folder = Path(output_dir)
        self.network = network
        self.class_names = list(class_names)
        self.threshold = threshold
        self.temperature = temperature
        self.feature_layer = feature_layer
        self.num_resamples = num_resamples
        self.seed = seed
        self.table = ProbabilityTable(output_dir, class_names, dataset_dir, threshold, training_ranges)
        self._features: list[torch.Tensor] = []
        self._hook: RemovableHandle | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred`` as probabilities and ``label``."""
        self.table.attach(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._end()  # of an earlier run that failed
        self._features.clear()
        if self.feature_layer is not None:
            layer = unwrapped(self.network).get_submodule(self.feature_layer)
            self._hook = layer.register_forward_pre_hook(lambda _, inputs: self._keep(inputs[0]))

    def _keep(self, features: torch.Tensor) -> None:
        self._features.append(features.detach().as_subclass(torch.Tensor).flatten(1).float().cpu())

    def _end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _write(self, engine: Any) -> None:
        self._end()
        rows = self.table.rows
        labels = np.array([self.class_names.index(row["label"]) for row in rows])
        guesses = np.array([self.class_names.index(row["prediction"]) for row in rows])
        chances = np.array([[row[f"probability_{name}"] for name in self.class_names] for row in rows])
        intervals = bootstrap_intervals(
            lambda truth, table: classification_scores(truth, table, self.threshold),
            labels,
            chances,
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        for name, interval in intervals.items():
            ends = {f"val_{name}": interval.value, f"val_{name}_low": interval.low, f"val_{name}_high": interval.high}
            engine.state.metrics.update(ends)
        numbers = [(name, *("" if math.isnan(x) else f"{x:.6f}" for x in found)) for name, found in intervals.items()]
        write_table(self.folder / "metrics.csv", ["metric", "value", "low_95", "high_95"], numbers)
        self._page(intervals, self._figures(labels, guesses, chances)).save(self.folder / "report.html")

    def _figures(
        self, labels: np.ndarray, guesses: np.ndarray, chances: np.ndarray
    ) -> list[tuple[str, Figure, str, str]]:
        """Return file name, figure, caption, and text for those who cannot see it."""
        names = self.class_names
        band = "Shaded: pointwise 95 % bands from a bootstrap stratified by class."
        found = [
            (
                "confusion_matrix",
                plot_confusion_matrix(labels, guesses, names),
                "Predicted and true classes.",
                "Counts of true and predicted classes.",
            ),
            (
                "roc",
                plot_roc(labels, chances, names, num_resamples=_BAND_RESAMPLES),
                f"Sensitivity against specificity at every threshold. {band}",
                "ROC curves with confidence bands; the areas are in the table.",
            ),
            (
                "precision_recall",
                plot_precision_recall(labels, chances, names, num_resamples=_BAND_RESAMPLES),
                f"Precision depends on how common each class is in these images. {band}",
                "Precision-recall curves with confidence bands; average precision is in the table.",
            ),
            (
                "reliability",
                plot_reliability(labels, chances, names),
                "How often it was true what was predicted with some probability; below, the number of images.",
                "Reliability diagram; the expected calibration error is in the table.",
            ),
        ]
        features = torch.cat(self._features) if self._features else torch.empty(0, 0)
        if len(features) == len(labels) >= 3 and bool(features.isfinite().all()):
            figure = plot_embedding(features, labels, names, guesses, seed=self.seed)
            caption = "The features that the last layer sees, drawn in the plane. Distances of far groups mean little."
            found.append(("features", figure, caption, "Points of the classes in the plane."))
        for name, figure, _, _ in found:
            figure.savefig(self.folder / f"{name}.png", dpi=100, metadata={"Software": None})
        return found

    def _page(self, intervals: Mapping[str, Interval], figures: Sequence[tuple[str, Figure, str, str]]) -> Report:
        rows = self.table.rows
        count = Counter(row["label"] for row in rows)
        report = Report("Evaluation of a classifier", ", ".join(f"{count[name]} {name}" for name in self.class_names))
        report.add_heading("Scores")
        chosen = {name: intervals[name] for name in ("auc", "balanced_accuracy", "sensitivity", "specificity")}
        report.add_key_figures(
            [(_TITLES[name], f"{x.value:.3f}", f"{x.low:.3f} to {x.high:.3f}") for name, x in chosen.items()]
        )
        report.add_table(
            ["Score", "Value", "95 % from", "to"],
            [(_TITLES[name], *(round(x, 4) for x in found)) for name, found in intervals.items()],
            "Intervals: bootstrap stratified by class, over these images. They say nothing about other hospitals.",
        )
        report.add_text(self._settings())
        report.add_heading("Pictures")
        for _, figure, caption, alt in figures:
            report.add_figure(figure, caption, alt)
        self._add_solves(report)
        self._add_mistakes(report)
        return report

    def _settings(self) -> str:
        positive = self.class_names[1]
        text = (
            f"{positive}, the positive class, is predicted from a probability of {self.threshold:.3f} on. "
            if len(self.class_names) == 2
            else "Sensitivity, specificity, F1 score, area and average precision are means over the classes, each "
            "against the rest. "
        )
        text += f"Logits were divided by {self.temperature:.3f} before the softmax. "
        text += "Where these images served to choose the model, its threshold or its temperature, scores are too good."
        if self.table.training_ranges:
            unlike = sum(bool(row["unlike_training"]) for row in self.table.rows)
            text += f"\n\n{unlike} of {len(self.table.rows)} images are unlike the training images; "
            text += "predictions.csv says in what."
        return text

    def _add_solves(self, report: Report) -> None:
        rows = [row for row in self.table.rows if "evaluations" in row]
        if not rows:
            return
        evaluations = np.array([row["evaluations"] for row in rows])
        residuals = [row["residual"] for row in rows if row["residual"] is not None]
        status = Counter(row["solve_status"] for row in rows)
        report.add_heading("Equilibria")
        report.add_table(
            ["Of the solves", "Value"],
            [
                ("Images", f"{len(rows)}"),
                *((f"Ended with status {name}", f"{number}") for name, number in sorted(status.items())),
                ("Evaluations per image, mean", f"{evaluations.mean():.2f}"),
                ("Evaluations, standard deviation", f"{evaluations.std():.2f}"),
                ("Evaluations, least and most", f"{evaluations.min():.0f} and {evaluations.max():.0f}"),
                ("Largest relative residual", f"{max(residuals):.2e}" if residuals else "n/a"),
            ],
        )

    def _add_mistakes(self, report: Report) -> None:
        wrong = [row for row in self.table.rows if row["label"] != row["prediction"]]
        wrong.sort(key=lambda row: row[f"probability_{row['label']}"])
        if wrong:
            report.add_heading("Worst mistakes")
            report.add_table(
                ["Image", "True", "Predicted", "Probability of the true class"],
                [
                    (row["image"], row["label"], row["prediction"], round(row[f"probability_{row['label']}"], 4))
                    for row in wrong[:_NUM_MISTAKES]
                ],
                f"{min(len(wrong), _NUM_MISTAKES)} of {len(wrong)} images that were predicted wrongly.",
            )
