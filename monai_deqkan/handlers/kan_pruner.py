"""Prune the KAN layers of a trained network before a training that fine-tunes it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_deqkan._checks import check_int
from monai_deqkan.handlers.best_model import replace_json, unwrapped
from monai_deqkan.networks.layers import KANMask, prune_edges
from monai_deqkan.networks.layers.kan_inputs import kan_layers, record_inputs

__all__ = ["KANPruner"]


class KANPruner:
    """Prune the least important edges when a training starts, and write ``pruning.json``: what that cost.

    The file holds the key metric before, right after pruning, and of the best epoch of the fine-tuning, all on the
    validation part, and how many edges each layer has left. The pruned edges stay zero; :class:`BestModelSaver` saves
    plain weights, zeros included, which load into an ordinary network. ``resume`` puts the masks in, for a checkpoint
    of a pruned network to fill.

    Args:
        network: network with trained weights.
        evaluator: measures the key metric; without handlers that save or stop.
        dataset: training images that show what the layers see, under ``image``, all of one size. Where validation does
            not call every KAN layer, as with heads for deep supervision, edges are judged without them.
        output_dir: folder of the file; made where absent.
        amount: share of all edges that go; see `monai_deqkan.networks.layers.prune_edges`, as the next two.
        scope: ``"global"`` or ``"layer"``.
        granularity: ``"edge"``, ``"kernel"`` or ``"input"``.
        num_images: number of training images used, spread evenly over the data set.
        batch_size: images in one batch.
        resume: whether a fine-tuning goes on.

    Raises:
        ValueError: if an option is out of its range, or the network has no KAN layer to prune.
    """

    def __init__(
        self,
        network: nn.Module,
        evaluator: Any,
        dataset: Sequence[Any],
        output_dir: str | os.PathLike[str],
        *,
        amount: float = 0.5,
        scope: str = "global",
        granularity: str = "edge",
        num_images: int = 32,
        batch_size: int = 8,
        resume: bool = False,
    ) -> None:
        self.network = unwrapped(network)
        self.evaluator = evaluator
        self.dataset = dataset
        self.path = Path(output_dir) / "pruning.json"
        self.settings: dict[str, Any] = {"amount": amount, "scope": scope, "granularity": granularity}
        self.num_images = check_int("num_images", num_images)
        self.batch_size = check_int("batch_size", batch_size)
        self.resume = resume
        self.record: dict[str, Any] = {}
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine, validator: Engine) -> None:
        """Attach to the trainer that fine-tunes, and to the evaluator that validates its epochs."""
        engine.add_event_handler(Events.STARTED, self._prune)
        validator.add_event_handler(Events.COMPLETED, self._note_epoch)

    def _prune(self, engine: Engine) -> None:
        if self.resume:
            prune_edges(self.network, 0.0)
            if self.path.is_file():
                self.record = json.loads(self.path.read_text(encoding="utf-8"))
            return
        before = self._measure()
        batches = self._batches()
        # Heads for deep supervision are not called outside of training: they have no inputs to be judged by.
        called = record_inputs(self.network, batches[:1], max_samples=1).layers
        seen = all(name in called for name in kan_layers(self.network))
        report = prune_edges(self.network, inputs=batches if seen else None, **self.settings)
        self._share_masks()
        self.logger.info("Pruned:\n%s", report)
        self.record = {
            "notice": "Research only; not for clinical use.",
            "metric": self.evaluator.state.key_metric_name,
            "before": before,
            "pruned": self._measure(),
            "fine_tuned": None,
            "fine_tuned_epoch": None,
            **self.settings,
            "output_change": report.output_change,
            "layers": [
                {"layer": record.layer, "num_units": record.num_units, "num_left": record.num_after}
                for record in report.records
            ],
        }
        self._write()

    def _share_masks(self) -> None:
        """Give all processes the masks of the first: each has seen other augmented images."""
        if idist.get_world_size() == 1:
            return
        for part in self.network.modules():
            if isinstance(part, KANMask):
                part.mask.copy_(torch.as_tensor(idist.broadcast(part.mask.to(torch.uint8), src=0)))

    def _measure(self) -> float:
        self.evaluator.run()
        return float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])

    def _batches(self) -> list[torch.Tensor]:
        count = min(self.num_images, len(self.dataset))
        device = next(self.network.parameters()).device
        rows = [index * len(self.dataset) // count for index in range(count)]
        images = [self._image(row) for row in rows]
        return [torch.stack(images[i : i + self.batch_size]).to(device) for i in range(0, count, self.batch_size)]

    def _image(self, row: int) -> torch.Tensor:
        sample = self.dataset[row]
        sample = sample[0] if isinstance(sample, list) else sample  # transforms that crop patches give lists
        return torch.as_tensor(sample["image"]).as_subclass(torch.Tensor)

    def _note_epoch(self, engine: Any) -> None:
        value = float(engine.state.metrics[engine.state.key_metric_name])
        best = self.record.get("fine_tuned")
        if best is None or value > best:
            self.record |= {"fine_tuned": value, "fine_tuned_epoch": int(engine.state.epoch)}
            self._write()

    def _write(self) -> None:
        if idist.get_rank() > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self.path, self.record)
