"""Keep the best model of a training, together with what one must know to use it."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_deqkan.networks.layers import KANMask, make_pruning_permanent

__all__ = ["BestModelSaver"]


class BestModelSaver:
    """Save the network whenever the validation's key metric improves: ``model.pt`` and ``model.json``.

    ``model.pt`` is a plain state dict, as the Model Zoo has it; of pruned KAN layers too, with zeros for what is gone.
    ``model.json`` beside it says what the network is for (class names, decision threshold, preprocessing), the metric
    and the epoch. Differences from MONAI's ``CheckpointSaver``: files are replaced in one step, so that a killed run
    leaves the older model intact; a resumed training knows the best metric so far; the task goes with the weights.

    Args:
        save_dir: folder to save into; made where absent.
        network: the network; a ``DistributedDataParallel`` wrapper is looked through.
        task: what one must know to use the weights; must be JSON.
        resume: whether an earlier run is being continued, whose best metric is to be beaten.

    Raises:
        TypeError: if ``task`` is not JSON.
        ValueError: if the earlier run's ``model.json`` is damaged.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], network: nn.Module, task: Mapping[str, Any], resume: bool = False
    ) -> None:
        self.save_dir = Path(save_dir)
        self.network = network
        self.task = dict(task)
        json.dumps(self.task)
        self.logger = logging.getLogger(__name__)
        self.best = float("-inf")
        if resume and (self.save_dir / "model.json").is_file():
            self.best = _best_so_far(self.save_dir / "model.json")

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator that computes the key metric."""
        engine.add_event_handler(Events.COMPLETED, self._save_if_better)

    def _save_if_better(self, engine: Any) -> None:
        name = engine.state.key_metric_name
        value = float(engine.state.metrics[name])
        if math.isnan(value):
            self.logger.warning("%s is not a number: this epoch's model is not kept. Check the validation part.", name)
        if not value > self.best:
            return
        self.best = value
        network = unwrapped(self.network)
        record = {**self.task, "key_metric": {"name": name, "value": value}, "epoch": int(engine.state.epoch)}
        self.save_dir.mkdir(parents=True, exist_ok=True)
        weights = self.save_dir / "model.pt"
        torch.save(plain_state(network), weights.with_suffix(".pt.part"))
        # The weights first: a kill in between leaves a number that is too low, which a resumed training will beat.
        os.replace(weights.with_suffix(".pt.part"), weights)
        replace_json(self.save_dir / "model.json", record)
        self.logger.info("Saved the best model so far (%s %.4f) to %s.", name, value, weights)


def _best_so_far(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["key_metric"]["value"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not tell the best metric of the training that goes on ({type(error).__name__}: {error}). "
            "Move model.json and model.pt away; the next best model will be saved anew."
        ) from None


def replace_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: a kill leaves the older one intact."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def plain_state(network: nn.Module) -> dict[str, Any]:
    """Return a state dict that fits a network which was never pruned."""
    if any(isinstance(module, KANMask) for module in network.modules()):
        network = make_pruning_permanent(copy.deepcopy(network))
    return network.state_dict()


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside a ``DistributedDataParallel`` wrapper, or the network itself."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
