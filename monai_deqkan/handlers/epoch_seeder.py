"""The same chance in each epoch, whether a training was resumed or not."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd

from monai_deqkan._checks import check_int

__all__ = ["EpochSeeder"]


class EpochSeeder:
    """Seed every epoch by its number, so that a resumed training repeats what an uninterrupted one does.

    It seeds torch's generators, which shuffle and drop out, and the random transforms of a data set; each process of a
    distributed training gets its own numbers.

    Args:
        dataset: training data, whose ``transform`` may be random.
        seed: of the whole training.

    Raises:
        ValueError: if the seed is negative.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = check_int("seed", seed, 0)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed)

    def _seed(self, engine: Any) -> None:
        entropy = np.random.SeedSequence([self.seed, idist.get_rank(), engine.state.epoch])
        shuffle, transforms = (int(value) for value in entropy.generate_state(2))
        torch.manual_seed(shuffle)
        set_rnd(self.dataset, transforms)
