"""What a solve returns, and how it says that it failed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "Solution",
    "SolveStatistics",
    "SolveStatus",
    "State",
    "state_parts",
]

State = Tensor | tuple[Tensor, ...]


def state_parts(state: State) -> tuple[Tensor, ...]:
    """Return a state's tensors: a tuple of one, or the tuple that it is."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def at_least_float32(value: Any) -> Any:
    """Raise half-precision tensors to float32, and take metadata off, within tuples too."""
    if isinstance(value, Tensor):
        value = value.as_subclass(Tensor)
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, (tuple, list)):
        return tuple(at_least_float32(item) for item in value)
    return value


class SolveStatus(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    """The residual reached the tolerance."""
    MAX_ITER = 1
    """The evaluations were used up first."""
    NON_FINITE = 2
    """An iterate became NaN or infinite; the best finite iterate is returned."""


class ConvergenceWarning(UserWarning):
    """Some samples of a solve did not reach the tolerance."""


class ConvergenceError(RuntimeError):
    """Some samples of a solve did not reach the tolerance, and ``on_failure`` is ``"raise"``."""


@dataclass(frozen=True)
class SolveStatistics:
    """How a solve went, per sample; all tensors are detached and live on the state's device.

    Attributes:
        status: :class:`SolveStatus` values, shape ``(B,)``.
        evaluations: number of evaluations of ``f`` (of ``A`` in a linear solve) spent, shape ``(B,)``.
        residual: root mean square of ``f(z) - z`` (of ``b - A x``, by recursion in conjugate gradients) at the returned
            iterate, shape ``(B,)``, in the unit of the state; NaN where nothing was evaluated.
        relative_residual: the residual over the root mean square of ``f(z)`` (of ``b``), shape ``(B,)``, dimensionless.
        history: relative residual of each evaluation, shape ``(evaluations, B)``; NaN after a sample has stopped. In a
            linear solve the first row is the start's, so there is one row more, unless ``x0`` was given.
    """

    status: Tensor
    evaluations: Tensor
    residual: Tensor
    relative_residual: Tensor
    history: Tensor

    @property
    def converged(self) -> Tensor:
        """Whether each sample reached the tolerance, bool of shape ``(B,)``."""
        return self.status == SolveStatus.CONVERGED

    @property
    def contraction_estimate(self) -> Tensor:
        """Mean factor (geometric) by which each sample's residual shrank per evaluation at the end, ``(B,)``.

        Over its last four steps or fewer, NaN where it made none. That of plain iteration tends to the spectral radius
        of the map's Jacobian; that of an accelerated method tells how much the acceleration gains.
        """
        last = (self.history.isfinite() & (self.history > 0)).sum(0) - 1
        if self.history.shape[0] < 2:
            return torch.full_like(self.residual, float("nan"))
        first = (last - 4).clamp_min(0)
        ends, starts = (self.history.gather(0, rows.clamp_min(0)[None])[0] for rows in (last, first))
        return ((ends / starts) ** (1.0 / (last - first).clamp_min(1))).where(last > 0, float("nan"))

    def report_failure(self, on_failure: str, what: str) -> None:
        """Warn, raise or stay silent about samples that did not converge, as ``on_failure`` says.

        Raises:
            ConvergenceError: if ``on_failure`` is ``"raise"`` and a sample did not converge.
        """
        if on_failure == "ignore" or bool(self.converged.all()):
            return
        num_failed = int((~self.converged).sum())
        num_broken = int((self.status == SolveStatus.NON_FINITE).sum())
        worst = float(torch.nan_to_num(self.relative_residual[~self.converged], nan=float("inf")).max())
        message = (
            f"{what}: {num_failed} of {self.status.numel()} samples did not converge within "
            f"{int(self.evaluations.max())} evaluations ({num_broken} of them became NaN or infinite); the largest "
            f"relative residual is {worst:.2e}. Raise `max_iter`, loosen `rtol`, or check that the map contracts."
        )
        if on_failure == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=3)


@dataclass(frozen=True)
class Solution:
    """A solution and how it was reached.

    Attributes:
        z: the solution, of the shape and dtype of the start: where converged the first iterate that met the tolerance,
            elsewhere the finite iterate of the smallest residual.
        stats: statistics per sample.
    """

    z: State
    stats: SolveStatistics

    @property
    def converged(self) -> Tensor:
        """Whether each sample reached the tolerance, bool of shape ``(B,)``."""
        return self.stats.converged
