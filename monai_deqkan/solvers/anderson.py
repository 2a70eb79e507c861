"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.solvers.base import SOLVERS, FixedPointSolver, SolverState

__all__ = ["AndersonSolver"]


@dataclass(frozen=True)
class _AndersonState(SolverState):
    step: int  # number of steps done
    delta_f: Tensor  # (B, m, N) differences of successive f(z)
    delta_g: Tensor  # (B, m, N) differences of successive residuals g(z) = f(z) - z
    gram: Tensor  # (B, m, m) float64 inner products of the rows of delta_g
    f: Tensor  # (B, N) previous f(z)
    g: Tensor  # (B, N) previous residual
    best_f: Tensor  # (B, N) f at the iterate of the smallest residual
    best_g: Tensor  # (B, N) that residual
    best_norm: Tensor  # (B,) its norm


@SOLVERS.register("anderson")
@dataclass(frozen=True, kw_only=True)
class AndersonSolver(FixedPointSolver):
    r"""Extrapolate from the last few evaluations, each sample on its own (Anderson acceleration, type II).

    With residuals :math:`g_k = f(z_k) - z_k`, matrices :math:`\Delta F, \Delta G` of the last ``history_size``
    differences of :math:`f` and :math:`g`, and damping :math:`d`,

    .. math::
        \gamma = \arg\min \|g_k - \Delta G \gamma\|^2 + \lambda \textstyle\sum_i \|\Delta G_i\|^2 \gamma_i^2, \qquad
        z_{k+1} = f(z_k) - d\, g_k - (\Delta F - d\, \Delta G) \gamma .

    Args:
        history_size: number :math:`m` of differences kept, at least 1.
        damping: :math:`d`, dimensionless, in ``[0, 1)``; one minus Walker and Ni's :math:`\beta`.
        regularization: :math:`\lambda`, dimensionless: relative to each difference, so that the unit of the state does
            not matter. (With the absolute one of other codes, acceleration fades out as the residual shrinks.)
        restart_growth: a sample whose residual norm exceeds its best one this many times starts anew from the best.
        rtol: see :class:`FixedPointSolver`.
        atol: see :class:`FixedPointSolver`.
        max_iter: see :class:`FixedPointSolver`.
        on_failure: see :class:`FixedPointSolver`.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        H. F. Walker and P. Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011)
        1715-1735, eq. (2.2)-(2.3) with the regularization and the restart added.
    """

    history_size: int = 6
    damping: float = 0.0
    regularization: float = 1e-10
    restart_growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("history_size", self.history_size)
        check_range("damping", self.damping, 0.0, 1.0, open_high=True)
        check_range("regularization", self.regularization, 0.0, open_low=True)
        check_range("restart_growth", self.restart_growth, 1.0, open_low=True)

    def init(self, z: Tensor) -> _AndersonState:
        """Return a state with an empty history."""
        size, length = z.shape
        history = z.new_zeros(size, self.history_size, length)
        gram = torch.zeros(size, self.history_size, self.history_size, dtype=torch.float64, device=z.device)
        norm = torch.full((size,), float("inf"), dtype=torch.float64, device=z.device)
        return _AndersonState(0, history, torch.zeros_like(history), gram, z, z, z, z, norm)

    def step(self, state: _AndersonState, z: Tensor, fz: Tensor) -> tuple[Tensor, _AndersonState]:
        """Return the extrapolated iterate; the first step and the first after a restart are plain ones."""
        g = fz - z
        norm = g.detach().double().norm(dim=1)
        better = norm < state.best_norm
        best_f = torch.where(better[:, None], fz, state.best_f)
        best_g = torch.where(better[:, None], g, state.best_g)
        best_norm = torch.where(better, norm, state.best_norm)

        delta_f, delta_g, gram = state.delta_f, state.delta_g, state.gram
        if state.step > 0:
            slot = (state.step - 1) % self.history_size
            delta_f = _with_row(delta_f, slot, fz - state.f)
            delta_g = _with_row(delta_g, slot, g - state.g)
            gram = _with_symmetric_row(gram, slot, _inner(delta_g, delta_g[:, slot]))

        gamma = self._weights(gram, _inner(delta_g, g)).to(z.dtype)  # (B, m)
        z_next = fz - torch.einsum("bm,bmn->bn", gamma, delta_f)
        if self.damping > 0.0:
            z_next = z_next - self.damping * (g - torch.einsum("bm,bmn->bn", gamma, delta_g))

        restart = norm > self.restart_growth * best_norm
        if bool(restart.any()):
            # Forget these samples' history and take a plain step from their best iterate.
            keep = (~restart)[:, None, None]
            delta_f, delta_g, gram = delta_f * keep, delta_g * keep, gram * keep
            z_next = torch.where(restart[:, None], best_f, z_next)
            fz = torch.where(restart[:, None], best_f, fz)
            g = torch.where(restart[:, None], best_g, g)
        return z_next, _AndersonState(state.step + 1, delta_f, delta_g, gram, fz, g, best_f, best_g, best_norm)

    def _weights(self, gram: Tensor, rhs: Tensor) -> Tensor:
        """Solve the normal equations, scaled to a unit diagonal so that the regularization is relative."""
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        used = diagonal > 0
        scale = torch.where(used, diagonal, torch.ones_like(diagonal)).rsqrt()
        matrix = gram * scale[:, :, None] * scale[:, None, :]
        # Empty rows are zero: a one on their diagonal gives them weight zero.
        matrix = matrix + torch.diag_embed(torch.where(used, self.regularization, 1.0).to(matrix.dtype))
        solution, info = torch.linalg.solve_ex(matrix, (rhs * scale)[:, :, None])
        gamma = solution[:, :, 0] * scale
        usable = (info == 0)[:, None] & torch.isfinite(gamma).all(dim=1, keepdim=True)
        return torch.where(usable, gamma, torch.zeros_like(gamma))


def _inner(rows: Tensor, vector: Tensor) -> Tensor:
    """Return the inner products of ``(B, m, N)`` and ``(B, N)`` in float64, row by row to save memory: ``(B, m)``."""
    vector = vector.double()
    return torch.stack([torch.linalg.vecdot(row.double(), vector) for row in rows.unbind(1)], dim=1)


def _with_row(history: Tensor, slot: int, row: Tensor) -> Tensor:
    """Return ``history`` with one row replaced: in place where nothing needs the old one, a copy under autograd."""
    if torch.is_grad_enabled():
        index = torch.tensor([slot], device=history.device)
        return history.index_copy(1, index, row[:, None])
    history[:, slot] = row
    return history


def _with_symmetric_row(gram: Tensor, slot: int, row: Tensor) -> Tensor:
    gram = gram.clone()
    gram[:, slot] = row
    gram[:, :, slot] = row
    return gram
