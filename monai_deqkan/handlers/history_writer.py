"""The learning curves of a training as a CSV."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor

__all__ = ["HistoryWriter"]


class HistoryWriter:
    """Write ``history.csv``: epoch, mean training loss, and every metric of the trainer and the evaluator.

    One line per epoch, written as soon as the epoch ends; a resumed training goes on with the lines it finds. List it
    after the ``ValidationHandler``, so that the epoch's validation is in. Epochs without
    validation repeat the last one's numbers.

    Args:
        output_dir: folder of the file; made where absent.
        evaluator: the evaluator that validates, or None.
    """

    def __init__(self, output_dir: str | os.PathLike[str], evaluator: Engine | None = None) -> None:
        self.path = Path(output_dir) / "history.csv"
        self.evaluator = evaluator
        self.rows: list[dict[str, float]] = []
        self._losses: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer whose output has ``loss``."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _start_epoch(self, engine: Any) -> None:
        self._losses.clear()
        if not self.rows and self.path.is_file():
            with self.path.open(newline="") as file:
                earlier = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
            self.rows = [row for row in earlier if row["epoch"] < engine.state.epoch]

    def _note_loss(self, engine: Any) -> None:
        output = engine.state.output
        loss = (output[0] if isinstance(output, list) else output)["loss"]
        self._losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def _write(self, engine: Engine) -> None:
        row = {"epoch": float(engine.state.epoch), "train_loss": sum(self._losses) / max(len(self._losses), 1)}
        row.update({name: float(value) for name, value in engine.state.metrics.items()})
        if self.evaluator is not None:
            # Both engines may count solves: the evaluator's get a prefix.
            for name, value in self.evaluator.state.metrics.items():
                row[name if name.startswith("val_") else f"val_{name}"] = float(value)
        self.rows.append(row)
        names = list(dict.fromkeys(name for known in self.rows for name in known))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
