"""Adapt the grids of KAN layers to their data on a schedule during training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.networks.layers import (
    GridRefit,
    InputStatistics,
    KANLayer,
    extend_grids,
    refit_grids,
    reset_optimizer_state,
)
from monai_deqkan.networks.layers.plain_weight import is_plain

__all__ = ["KANGridHandler"]


class KANGridHandler:
    """Refit the grids of a network's KAN layers to their inputs, and extend them, at stated epochs of a training.

    Each of these happens at the end of the epoch, a refit first. The inputs are those of the epoch's last training
    iterations, recorded by hooks: no extra pass over data. One line is logged for each refit and extension. Layers
    whose weight is parametrized, such as certified ones, stay as they are.

    Attach it before the handlers that validate and save at the end of an epoch. A checkpoint saved afterwards holds
    the grids: loading it into a newly built network, as MONAI's ``CheckpointLoader`` does, brings the extended layers
    back, and the schedule goes on by the epoch's number. In distributed runs process 0 decides, by its own inputs,
    and sends the result to the others; under ``DistributedDataParallel``, which fixes the shapes of parameters,
    refits keep the number of functions and extensions are refused.

    Args:
        network: the network in training; a ``DistributedDataParallel`` wrapper is looked through.
        optimizer: its optimizer, whose running averages are dropped for weights that change shape; may be left out
            where none does.
        refit_every: refit after every so many epochs.
        refit_epochs: refit after these epochs, counted from 1.
        extend_at: number of grid intervals to extend to after an epoch, such as ``{20: 10, 40: 20}``; in a JSON config
            the epochs are strings.
        stop_epoch: no refit after this epoch.
        num_batches: number of training iterations recorded for a refit.
        max_samples: inputs kept per layer; see `monai_deqkan.networks.layers.InputStatistics`.
        margin: share of the range added at each end; see `monai_deqkan.networks.layers.refit_grid`, as the next three.
        dead_band: relative shift below which a channel's grid stays.
        max_change: a channel keeps its grid where the refit would change its functions by more.
        max_growth: largest factor of refinement in order not to; 1 keeps the size of the weights.

    Raises:
        ValueError: if nothing is scheduled, an epoch or number is wrong, shapes may change without an optimizer to
            tell, or under ``DistributedDataParallel``; or if the network has no KAN layer.
        TypeError: if an epoch or number is of the wrong kind.

    Reference:
        The schedule, to adapt the grid to the data and then to extend it, is that of the KM-UNet in the project's
        founding proposal, which has no public reference; its refit is another one. Extension: Z. Liu et al., "KAN:
        Kolmogorov-Arnold networks", ICLR 2025, section 2.4.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        refit_every: int | None = None,
        refit_epochs: Sequence[int] = (),
        extend_at: Mapping[int | str, int] | None = None,
        stop_epoch: int | None = None,
        num_batches: int = 50,
        max_samples: int = 8192,
        margin: float = 0.0,
        dead_band: float = 0.05,
        max_change: float = 0.1,
        max_growth: int = 1,
    ) -> None:
        self.network = network.module if isinstance(network, DistributedDataParallel) else network
        self.optimizer = optimizer
        self.refit_every = None if refit_every is None else check_int("refit_every", refit_every)
        self.refit_epochs = frozenset(check_int("refit_epochs", epoch) for epoch in refit_epochs)
        self.extend_at = {
            _epoch(key): check_int("extend_at", size) for key, size in ({} if extend_at is None else extend_at).items()
        }
        self.stop_epoch = None if stop_epoch is None else check_int("stop_epoch", stop_epoch, 0)
        self.num_batches = check_int("num_batches", num_batches)
        self.max_samples = check_int("max_samples", max_samples)
        self.settings: dict[str, Any] = {
            "margin": check_range("margin", margin, 0.0, 10.0),
            "dead_band": check_range("dead_band", dead_band, 0.0, 1.0),
            "max_change": check_range("max_change", max_change, 0.0),
            "max_growth": check_int("max_growth", max_growth),
        }
        self._check_schedule(isinstance(network, DistributedDataParallel))
        self._statistics: InputStatistics | None = None
        self.logger = logging.getLogger(__name__)

    def _check_schedule(self, fixed_shapes: bool) -> None:
        if self.refit_every is None and not self.refit_epochs and not self.extend_at:
            raise ValueError("Nothing is scheduled; give `refit_every`, `refit_epochs` or `extend_at`.")
        InputStatistics(self.network)  # raises if there is no KAN layer
        if not self.extend_at and self.settings["max_growth"] == 1:
            return
        if fixed_shapes:
            raise ValueError(
                "Under DistributedDataParallel `extend_at` and `max_growth` above 1 are not possible: it fixes the "
                "shapes of parameters. Train in stages: extend with extend_grids, wrap anew, and go on."
            )
        if self.optimizer is None:
            raise ValueError(
                "`optimizer` is needed where weights change shape: by `extend_at` or `max_growth` above 1."
            )

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_recording)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._pause_recording)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._adapt)

    def is_refit_epoch(self, epoch: int) -> bool:
        """Say whether there is a refit after this epoch."""
        if self.stop_epoch is not None and epoch > self.stop_epoch:
            return False
        return epoch in self.refit_epochs or (self.refit_every is not None and epoch % self.refit_every == 0)

    def _start_recording(self, engine: Engine) -> None:
        epoch, length = engine.state.epoch, engine.state.epoch_length
        if idist.get_rank() != 0 or not self.is_refit_epoch(epoch):
            return
        if length is not None and engine.state.iteration <= epoch * length - self.num_batches:
            return
        if self._statistics is None:
            self._statistics = InputStatistics(self.network, self.max_samples, seed=epoch)
        self._statistics.start()

    def _pause_recording(self) -> None:
        if self._statistics is not None:
            self._statistics.stop()  # a validation between iterations is not to be recorded

    def _forget(self) -> None:
        self._pause_recording()
        self._statistics = None

    def _adapt(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if self.is_refit_epoch(epoch):
            self._refit(epoch)
        if epoch in self.extend_at:
            extensions = extend_grids(self.network, grid_size=self.extend_at[epoch])
            change, outside = (
                max((getattr(extension, name) for extension in extensions), default=0.0)
                for name in ("relative_change", "outside_change")
            )
            self.logger.info(
                "Epoch %d: grids of %d KAN layers extended to %d intervals; largest change on a grid %.1e, beyond it "
                "%.1e.",
                epoch,
                len(extensions),
                self.extend_at[epoch],
                change,
                outside,
            )
        if self.optimizer is not None:
            reset_optimizer_state(self.optimizer)

    def _refit(self, epoch: int) -> None:
        records: list[GridRefit] = []
        if self._statistics is not None:
            statistics = self._statistics
            self._forget()
            if statistics.layers:
                records = refit_grids(self.network, statistics, **self.settings)
        if idist.get_world_size() > 1:
            _send_grids(self.network)
        if records:
            worst = max(records, key=lambda record: record.relative_change)
            self.logger.info(
                "Epoch %d: grids of %d KAN layers refitted, %d of %d channels kept theirs; inputs outside %.2f %% -> "
                "%.2f %%; largest change %.2f %% (%s).",
                epoch,
                len(records),
                sum(len(record.kept) for record in records),
                sum(len(record.channel_change) for record in records),
                100 * sum(record.outside_before for record in records) / len(records),
                100 * sum(record.outside_after for record in records) / len(records),
                100 * worst.relative_change,
                worst.layer or "the network",
            )
        elif idist.get_rank() == 0:
            self.logger.warning("Epoch %d: no KAN layer received an input; no grid was refitted.", epoch)


def _epoch(key: int | str) -> int:
    return check_int("extend_at", int(key) if isinstance(key, str) and key.isdecimal() else key)


@torch.no_grad()
def _send_grids(network: nn.Module) -> None:
    """Give every process the grids and coefficients of process 0."""
    layers = [module for module in network.modules() if isinstance(module, KANLayer) and is_plain(module)]
    grids: list[Any] = [
        (layer.basis, layer.coefficients.cpu(), _cpu(layer.input_scale), _cpu(layer.input_shift)) for layer in layers
    ]
    dist.broadcast_object_list(grids, src=0)
    if idist.get_rank() == 0:
        return
    for layer, (basis, coefficients, scale, shift) in zip(layers, grids, strict=True):
        layer.set_basis(basis, coefficients.to(layer.weight.device))
        layer.set_input_map(scale, shift)


def _cpu(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.cpu()
