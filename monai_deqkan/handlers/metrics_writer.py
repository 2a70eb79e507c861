"""An evaluation's numbers as one JSON file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from ignite.engine import Engine, Events

__all__ = ["MetricsWriter"]


class MetricsWriter:
    """Write the metrics of an evaluation to ``metrics.json``; numbers that are not finite become null.

    Attach it after the handlers that add metrics, such as :class:`SolveStatsHandler`.

    Args:
        output_dir: folder of the file; made where absent.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.path = Path(output_dir) / "metrics.json"

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        values = {name: float(value) for name, value in engine.state.metrics.items() if _is_number(value)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.path.write_text(json.dumps(finite, indent=2) + "\n")


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
