"""Solve statistics of every iteration, in the engine's metrics."""

from __future__ import annotations

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from monai_deqkan.handlers.iteration_recorder import IterationRecorder

__all__ = ["SolveStatsHandler"]


class SolveStatsHandler:
    """Put the statistics of an epoch's equilibrium solves into ``engine.state.metrics``.

    Three numbers an epoch, which MONAI's ``StatsHandler`` and ``TensorBoardStatsHandler`` then log like any metric when
    they are listed after this one: ``solve_evaluations`` (mean per sample), ``solve_converged`` (share of samples that
    reached the tolerance) and ``solve_residual`` (largest relative residual); with ``backward`` also
    ``backward_converged``, the share of the gradients' solves. In distributed runs they are those of all processes'
    samples, the same in each process; so attach it in every one.

    Args:
        backward: whether to report the gradients' solves too; for trainers.
        prefix: text put before each name.
    """

    def __init__(self, backward: bool = False, prefix: str = "") -> None:
        self.backward = backward
        self.prefix = prefix
        self._recorder: IterationRecorder | None = None
        self._epoch: dict[str, list[torch.Tensor]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or evaluator."""
        self._recorder = IterationRecorder.of(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start_epoch(self, engine: Engine) -> None:
        self._epoch = {"evaluations": [], "converged": [], "residual": [], "backward": []}

    def _collect(self, engine: Engine) -> None:
        if self._recorder is None:
            return
        recorder = self._recorder.last
        self._epoch["evaluations"].append(recorder.evaluations().double())
        self._epoch["converged"].append(recorder.converged().double())
        self._epoch["residual"].append(recorder.relative_residual().double())
        self._epoch["backward"].append(recorder.converged("backward").double())

    def _report(self, engine: Engine) -> None:
        names = {"solve_evaluations": "evaluations", "solve_converged": "converged"}
        if self.backward:
            names["backward_converged"] = "backward"
        metrics = {name: _mean(self._all(field)) for name, field in names.items()}
        metrics["solve_residual"] = _largest(torch.nan_to_num(self._all("residual"), nan=float("inf")))
        engine.state.metrics.update({self.prefix + name: value for name, value in metrics.items() if value is not None})

    def _all(self, field: str) -> torch.Tensor:
        values = self._epoch[field]
        return torch.cat(values) if values else torch.empty(0, dtype=torch.float64)


def _mean(values: torch.Tensor) -> float | None:
    """Return the mean over all processes' samples; None where no process has one."""
    if idist.get_world_size() == 1:
        return float(values.mean()) if values.numel() else None
    total = torch.tensor([float(values.sum()), values.numel()], dtype=torch.float64, device=idist.device())
    value_sum, count = torch.as_tensor(idist.all_reduce(total)).tolist()
    return value_sum / count if count else None


def _largest(values: torch.Tensor) -> float | None:
    """Return the largest value of all processes' samples, none of them negative; None where no process has one."""
    largest = torch.cat([values, values.new_tensor([-1.0])]).max()
    if idist.get_world_size() > 1:
        largest = torch.as_tensor(idist.all_reduce(largest.to(idist.device()), op="MAX"))
    return float(largest) if largest >= 0 else None
