"""What a solver is: settings, `init`, `step` and `has_converged`. The loop around them is in `solve.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

from monai_deqkan._checks import check_choice, check_int, check_range
from monai_deqkan.plugins import Registry

__all__ = ["LINEAR_SOLVERS", "SOLVERS", "FixedPointSolver", "LinearSolver", "SolverState"]

S = TypeVar("S", bound="SolverState")


@dataclass(frozen=True)
class SolverState:
    """What a solver remembers between steps; it is passed in and out and never kept on the solver.

    Fields that are tensors have the running samples as their first axis, so that :meth:`take` can drop samples.
    """

    def take(self: S, rows: Tensor) -> S:
        """Return the state of some of the running samples only."""
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(value[rows] if isinstance(value, Tensor) else value for value in values))


@dataclass(frozen=True, kw_only=True)
class _SolverSettings:
    rtol: float = 1e-4
    atol: float = 0.0
    max_iter: int = 50
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        check_range("rtol", self.rtol, 0.0)
        check_range("atol", self.atol, 0.0)
        check_int("max_iter", self.max_iter, minimum=0)
        check_choice("on_failure", self.on_failure, ("warn", "raise", "ignore"))

    def has_converged(self, residual: Tensor, scale: Tensor) -> Tensor:
        """Return which samples may stop: ``residual <= atol + rtol * scale``, both of shape ``(B,)``."""
        return residual <= self.atol + self.rtol * scale


class FixedPointSolver(_SolverSettings, ABC):
    r"""Find :math:`z` with :math:`z = f(z)`.

    A solver is a frozen set of settings and the published method: :meth:`init` makes the state, :meth:`step` makes the
    next iterate. Iterates reach it as real matrices ``(B, N)``, one row per sample, in float32 or float64; counting,
    stopping per sample, and the best iterate are the business of :func:`~monai_deqkan.solvers.solve_fixed_point`.

    Args:
        rtol: relative tolerance: a sample stops when ``rms(f(z) - z) <= atol + rtol * rms(f(z))``, dimensionless.
        atol: absolute tolerance, in the unit of the state.
        max_iter: most evaluations of ``f``.
        on_failure: what to do when a sample does not converge: ``"warn"``, ``"raise"`` or ``"ignore"``.
    """

    @abstractmethod
    def init(self, z: Tensor) -> Any:
        """Return the state before the first step from ``z``, shape ``(B, N)``."""

    def note_residual(self, state: Any, residual: Tensor) -> Any:
        """Return the state after the residual's root mean square ``(B,)`` was measured, just before :meth:`step`.

        The loop has it anyway; a solver that wants it need not measure it again. By default it is not kept.
        """
        return state

    @abstractmethod
    def step(self, state: Any, z: Tensor, fz: Tensor) -> tuple[Tensor, Any]:
        """Return the next iterate and the next state, given an iterate ``z`` and ``fz = f(z)``, both ``(B, N)``.

        Must treat rows independently, and be differentiable where gradients are enabled.
        """


class LinearSolver(_SolverSettings, ABC):
    r"""Find :math:`x` with :math:`A x = b`.

    Like :class:`FixedPointSolver`, with rows of real numbers ``(B, N)``; complex unknowns are passed as pairs of reals,
    in which a complex self-adjoint ``A`` is real symmetric.

    Args:
        rtol: relative tolerance: a sample stops when ``rms(b - A x) <= atol + rtol * rms(b)``, dimensionless.
        atol: absolute tolerance, in the unit of ``b``.
        max_iter: most applications of ``A``.
        on_failure: what to do when a sample does not converge: ``"warn"``, ``"raise"`` or ``"ignore"``.
    """

    @abstractmethod
    def init(self, x: Tensor, residual: Tensor) -> Any:
        """Return the state before the first step from ``x``, whose residual ``b - A x`` is given, both ``(B, N)``."""

    @abstractmethod
    def step(self, A: Callable[[Tensor], Tensor], state: Any) -> Any:
        """Return the next state, spending one application of ``A``; states have fields ``x`` and ``residual``."""


SOLVERS: Registry[FixedPointSolver] = Registry("monai_deqkan.solvers", "solver", FixedPointSolver)
LINEAR_SOLVERS: Registry[LinearSolver] = Registry("monai_deqkan.linear_solvers", "linear solver", LinearSolver)
