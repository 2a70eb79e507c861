"""An early stop that a resumed training goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.handlers import EarlyStopHandler

__all__ = ["ResumableEarlyStop"]


class ResumableEarlyStop(EarlyStopHandler):
    """Stop a training when a score has not improved for some epochs; put it among a checkpoint's items.

    Difference from MONAI's handler, whose arguments it takes: the best score and the number of epochs since are saved
    and loaded, so that a resumed training stops where an uninterrupted one would. A training that was stopped so, and
    is resumed without more ``patience``, goes on for as long as each epoch improves.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and the number of epochs since, in plain Python types."""
        state = self._ready().state_dict()
        # A metric may be a NumPy number, which a checkpoint read with weights_only must not hold.
        return {k: v if v is None or isinstance(v, (str, int)) else float(v) for k, v in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._ready().load_state_dict(state_dict)

    def _ready(self) -> Any:
        if self._handler is None:
            raise RuntimeError("The early stop has no trainer yet. Call `set_trainer` first.")
        return self._handler
