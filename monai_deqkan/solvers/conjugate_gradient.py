"""The conjugate gradient method for self-adjoint positive definite systems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan.solvers.base import LINEAR_SOLVERS, LinearSolver, SolverState

__all__ = ["ConjugateGradientSolver"]


@dataclass(frozen=True)
class _ConjugateGradientState(SolverState):
    x: Tensor  # (B, N)
    residual: Tensor  # (B, N) b - A x, by recursion
    direction: Tensor  # (B, N)
    squared: Tensor  # (B,) float64 squared norm of the residual


@LINEAR_SOLVERS.register("conjugate_gradient")
@dataclass(frozen=True, kw_only=True)
class ConjugateGradientSolver(LinearSolver):
    """Solve ``A x = b`` for a self-adjoint positive (semi-)definite ``A`` by conjugate gradients.

    Args:
        rtol: see :class:`LinearSolver`; the residual is the recursive one.
        atol: see :class:`LinearSolver`.
        max_iter: see :class:`LinearSolver`.
        on_failure: see :class:`LinearSolver`.

    Reference:
        M. R. Hestenes and E. Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. NBS 49
        (1952) 409-436, section 3.
    """

    rtol: float = 1e-6

    def init(self, x: Tensor, residual: Tensor) -> _ConjugateGradientState:
        """Return the state at the start."""
        return _ConjugateGradientState(x, residual, residual, _squared(residual))

    def step(self, A: Callable[[Tensor], Tensor], state: _ConjugateGradientState) -> _ConjugateGradientState:
        """Advance by one conjugate direction."""
        image = A(state.direction)
        curvature = torch.linalg.vecdot(state.direction.double(), image.double())
        # Zero curvature means that the direction is zero or in the null space: nothing more can be gained there.
        alpha = _ratio(state.squared, curvature).to(state.x.dtype)[:, None]
        residual = state.residual - alpha * image
        squared = _squared(residual)
        beta = _ratio(squared, state.squared).to(state.x.dtype)[:, None]
        return _ConjugateGradientState(
            state.x + alpha * state.direction, residual, residual + beta * state.direction, squared
        )


def _squared(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows.double(), rows.double())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(
        denominator == 0, torch.zeros_like(numerator), numerator / denominator.where(denominator != 0, 1.0)
    )
