"""Collect the statistics of solves, however deep inside a network they happen."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from monai_deqkan.solvers.solution import SolveStatistics, SolveStatus

__all__ = ["SolveRecord", "SolveRecorder", "open_recorders"]

_OPEN: ContextVar[tuple[SolveRecorder, ...]] = ContextVar("monai_deqkan_open_recorders", default=())


def open_recorders() -> tuple[SolveRecorder, ...]:
    """Return the recorders that are open here, outermost first.

    A backward pass on a GPU runs in another thread, which sees none: an adjoint calls this in the forward pass and
    keeps the result.
    """
    return _OPEN.get()


@dataclass(frozen=True)
class SolveRecord:
    """The statistics of one solve.

    Attributes:
        kind: ``"forward"`` (an equilibrium), ``"backward"`` (its gradient) or ``"linear"`` (a linear system).
        stats: statistics per sample.
    """

    kind: str
    stats: SolveStatistics


class SolveRecorder:
    """A ``with`` block that collects the statistics of every solve inside it.

    Blocks may be nested; each collects. Nothing is left behind on any module, so one forward pass may hold many
    solves (sliding windows) and modules may be shared between threads.

    Example:
        >>> import torch
        >>> from monai_deqkan.solvers import FixedPointIteration, SolveRecorder, solve_fixed_point
        >>> with SolveRecorder() as recorder:
        ...     solution = solve_fixed_point(torch.cos, torch.zeros(2, 1), FixedPointIteration(rtol=1e-3))
        >>> len(recorder.records), bool(recorder.converged("forward").all())
        (1, True)
    """

    def __init__(self) -> None:
        self.records: list[SolveRecord] = []

    def __enter__(self) -> SolveRecorder:
        _OPEN.set((*_OPEN.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # By identity, not by token: handlers may close blocks in another order than they opened them.
        _OPEN.set(tuple(recorder for recorder in _OPEN.get() if recorder is not self))

    def add(self, kind: str, stats: SolveStatistics) -> None:
        """Keep the statistics of one solve."""
        self.records.append(SolveRecord(kind, stats))

    def clear(self) -> None:
        """Forget everything collected so far."""
        self.records.clear()

    def status(self, kind: str = "forward") -> Tensor:
        """Return the status of every sample of every solve of that kind, in order, on the CPU."""
        return self._gather("status", kind)

    def converged(self, kind: str = "forward") -> Tensor:
        """Return whether each sample of each solve of that kind converged, in order, on the CPU."""
        return self.status(kind) == SolveStatus.CONVERGED

    def evaluations(self, kind: str = "forward") -> Tensor:
        """Return the number of evaluations of every sample of every solve of that kind, on the CPU."""
        return self._gather("evaluations", kind)

    def relative_residual(self, kind: str = "forward") -> Tensor:
        """Return the relative residual of every sample of every solve of that kind, on the CPU."""
        return self._gather("relative_residual", kind)

    def _gather(self, field: str, kind: str) -> Tensor:
        values = [getattr(record.stats, field).cpu() for record in self.records if record.kind == kind]
        return torch.cat(values) if values else torch.empty(0)
