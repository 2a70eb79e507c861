"""A guard against trainings and evaluations on equilibria that were not found."""

from __future__ import annotations

import warnings

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from monai_deqkan._checks import check_choice, check_int, check_range
from monai_deqkan.handlers.iteration_recorder import IterationRecorder
from monai_deqkan.solvers import ConvergenceError, ConvergenceWarning

__all__ = ["ConvergenceGuard"]


class ConvergenceGuard:
    """Count the samples whose equilibrium was not found; warn, stop or raise when they become too many.

    A round (an iteration, or an epoch) fails when more than ``max_share`` of its samples did not converge. After
    ``patience`` failing rounds in a row the guard acts, with one line that says how many samples failed where; it
    acts again only after a round that did not fail. Each epoch's count is put into ``engine.state.metrics`` as
    ``solve_unconverged``, and one line into the engine's log where it is not zero.

    In distributed runs the samples of all processes are counted together, so that all decide alike; attach it in
    every one. With ``every="iteration"`` they must have equally many iterations, as in training; where that is not
    sure, as in an evaluation, choose ``"epoch"``.

    Args:
        max_share: largest share of samples that may fail, in ``[0, 1]``.
        patience: number of failing rounds in a row that are needed, at least 1.
        action: ``"warn"`` (a ConvergenceWarning), ``"stop"`` (ends this engine's run, after which handlers of its
            completion run as usual) or ``"raise"`` (a ConvergenceError).
        every: what a round is: ``"iteration"`` or ``"epoch"``.
        backward: whether the gradients' solves count too.
        prefix: text put before the name of the metric.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> engine = Engine(lambda engine, batch: None)
        >>> ConvergenceGuard(max_share=0.1, patience=20, action="stop").attach(engine)
    """

    def __init__(
        self,
        max_share: float = 0.0,
        patience: int = 1,
        action: str = "warn",
        *,
        every: str = "iteration",
        backward: bool = False,
        prefix: str = "",
    ) -> None:
        self.max_share = check_range("max_share", max_share, 0.0, 1.0)
        self.patience = check_int("patience", patience)
        self.action = check_choice("action", action, ("warn", "stop", "raise"))
        self.every = check_choice("every", every, ("iteration", "epoch"))
        self.kinds = ("forward", "backward") if backward else ("forward",)
        self.prefix = prefix
        self._recorder: IterationRecorder | None = None
        self._streak = 0  # failing rounds in a row
        self._streak_counts = torch.zeros(2, dtype=torch.float64)  # unconverged samples and all samples in them
        self._epoch_counts = torch.zeros(2, dtype=torch.float64)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or evaluator."""
        self._recorder = IterationRecorder.of(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self._streak = 0
        self._streak_counts = torch.zeros(2, dtype=torch.float64)

    def _start_epoch(self, engine: Engine) -> None:
        self._epoch_counts = torch.zeros(2, dtype=torch.float64)

    def _count(self, engine: Engine) -> None:
        if self._recorder is None:
            return
        converged = torch.cat([self._recorder.last.converged(kind) for kind in self.kinds])
        counts = torch.tensor([float((~converged).sum()), converged.numel()], dtype=torch.float64)
        if self.every == "iteration":
            counts = _over_processes(counts)
            self._judge(engine, counts)
        self._epoch_counts += counts

    def _report(self, engine: Engine) -> None:
        counts = self._epoch_counts if self.every == "iteration" else _over_processes(self._epoch_counts)
        failed, total = (int(count) for count in counts.tolist())
        if total:
            engine.state.metrics[self.prefix + "solve_unconverged"] = failed
        if failed:
            engine.logger.warning("Epoch %d: %d of %d equilibria not found.", engine.state.epoch, failed, total)
        if self.every == "epoch":
            self._judge(engine, counts)

    def _judge(self, engine: Engine, counts: torch.Tensor) -> None:
        """Take note of one round, whose counts are the same in every process, and act if it is time."""
        failed, total = counts.tolist()
        if total == 0:
            return
        if failed <= self.max_share * total:
            self._start(engine)
            return
        self._streak += 1
        self._streak_counts = self._streak_counts + counts
        if self._streak == self.patience:
            self._act(engine)

    def _act(self, engine: Engine) -> None:
        failed, total = (int(count) for count in self._streak_counts.tolist())
        rounds = f"this {self.every}" if self.patience == 1 else f"the last {self.patience} {self.every}s"
        message = (
            f"{failed} of {total} equilibria of {rounds} were not found (more than {100 * self.max_share:g} % of "
            f"each; epoch {engine.state.epoch}, iteration {engine.state.iteration}). Raise the solver's `max_iter`, "
            "loosen its `rtol`, lower the learning rate, or use a cell that contracts."
        )
        if self.action == "raise":
            raise ConvergenceError(message)
        if self.action == "stop":
            engine.logger.error("Stopped: %s", message)
            engine.terminate()
        else:
            warnings.warn(message, ConvergenceWarning, stacklevel=2)


def _over_processes(counts: torch.Tensor) -> torch.Tensor:
    if idist.get_world_size() == 1:
        return counts
    return torch.as_tensor(idist.all_reduce(counts.to(idist.device()))).cpu()
