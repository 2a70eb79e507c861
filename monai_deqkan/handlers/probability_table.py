"""Class probabilities of each image, as CSV and JSON."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from monai_deqkan.handlers.iteration_recorder import IterationRecorder
from monai_deqkan.handlers.table import image_name, write_table
from monai_deqkan.metrics.classification import decide
from monai_deqkan.metrics.training_range import image_statistics, outside_training
from monai_deqkan.solvers import SolveRecorder, SolveStatus

__all__ = ["ProbabilityTable"]


class ProbabilityTable:
    """Write ``predictions.csv`` and ``predictions.json``: image, one probability per class, predicted class.

    Further columns where there is something to tell: the true class (``label``); how the image's equilibria were
    solved (``evaluations``, largest relative ``residual``, worst ``solve_status``); and ``unlike_training``: the
    statistics of the image that lie outside the range of the training images, see
    :func:`~monai_deqkan.metrics.image_statistics`, empty where none does.

    Images are named by their path below ``dataset_dir``; nothing from a file's header is written.

    Args:
        output_dir: folder of the files; made where absent.
        class_names: names of the classes, in the order of the network's outputs.
        dataset_dir: folder that image paths are written relative to.
        threshold: see :func:`~monai_deqkan.metrics.decide`.
        training_ranges: ranges of the training images' statistics, from the model's description.
        skipped: files that could not be read, with ``file`` and ``reason``, listed in the JSON file.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        class_names: Sequence[str],
        dataset_dir: str | os.PathLike[str],
        threshold: float = 0.5,
        training_ranges: Mapping[str, Sequence[float]] | None = None,
        skipped: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.path = Path(output_dir) / "predictions.csv"
        self.class_names = list(class_names)
        self.dataset_dir = Path(dataset_dir)
        self.threshold = threshold
        self.training_ranges = dict(training_ranges or {})
        self.skipped = [dict(entry) for entry in skipped]
        self.rows: list[dict[str, Any]] = []
        self.logger = logging.getLogger(__name__)
        self._recorder: IterationRecorder | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred`` as probabilities."""
        self._recorder = IterationRecorder.of(engine)
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Any) -> None:
        samples = engine.state.output
        solves = _solves(self._recorder.last, len(samples)) if self._recorder else [{} for _ in samples]
        for sample, solve in zip(samples, solves, strict=True):
            probabilities = torch.as_tensor(sample["pred"]).detach().cpu().flatten()
            row: dict[str, Any] = {"image": image_name(sample, self.dataset_dir)}
            for name, probability in zip(self.class_names, probabilities.tolist(), strict=True):
                row[f"probability_{name}"] = probability
            row["prediction"] = self.class_names[int(decide(probabilities, self.threshold).argmax())]
            if sample.get("label") is not None:
                row["label"] = self.class_names[_class_index(torch.as_tensor(sample["label"]))]
            row |= solve
            if self.training_ranges:
                statistics = image_statistics(sample["image"], sample["image"].meta.get("spatial_shape"))
                row["unlike_training"] = outside_training(statistics, self.training_ranges)
            self.rows.append(row)

    def _write(self, engine: Engine) -> None:
        header = list(dict.fromkeys(name for row in self.rows for name in row)) or self._bare_header()
        write_table(self.path, header, [[_cell(name, row.get(name)) for name in header] for row in self.rows])
        record = {
            "notice": "Research only; not for clinical use.",
            "class_names": self.class_names,
            "threshold": self.threshold,
            "images": self.rows,
            "skipped": self.skipped,
        }
        self.path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self._report()

    def _bare_header(self) -> list[str]:
        return ["image", *(f"probability_{name}" for name in self.class_names), "prediction"]

    def _report(self) -> None:
        unlike = [row["unlike_training"] for row in self.rows if row.get("unlike_training")]
        if unlike:
            found = Counter(name for names in unlike for name in names)
            reasons = ", ".join(f"{name} {count}" for name, count in found.most_common(3))
            text = "%d of %d images are unlike the training images (%s): do not rely on their predictions; see %s."
            self.logger.warning(text, len(unlike), len(self.rows), reasons, self.path.name)


def _solves(recorder: SolveRecorder, count: int) -> list[dict[str, Any]]:
    """Return the statistics of each of ``count`` samples over all solves of one forward pass; empty without any."""
    status = recorder.status()
    if status.numel() == 0 or status.numel() % count:
        return [{} for _ in range(count)]
    evaluations = recorder.evaluations().reshape(-1, count).sum(dim=0).tolist()
    residuals = recorder.relative_residual().reshape(-1, count).amax(dim=0).tolist()
    worst = status.reshape(-1, count).amax(dim=0).tolist()
    return [
        {"evaluations": e, "residual": r if r == r else None, "solve_status": SolveStatus(int(s)).name.lower()}
        for e, r, s in zip(evaluations, residuals, worst, strict=True)
    ]


def _cell(column: str, value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(value)
    if isinstance(value, float):
        return f"{value:.3e}" if column == "residual" else f"{value:.6f}"
    return "" if value is None else value


def _class_index(label: torch.Tensor) -> int:
    """Return the class of a label that is an index or one-hot."""
    return int(label.argmax()) if label.numel() > 1 else int(label)
