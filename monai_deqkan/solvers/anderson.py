"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_deqkan._checks import check_range
from monai_deqkan.solvers.base import SOLVERS
from monai_deqkan.solvers.secant import SecantSolver, SecantState, inner_products

__all__ = ["AndersonSolver", "anderson_weights"]


@SOLVERS.register("anderson")
@dataclass(frozen=True, kw_only=True)
class AndersonSolver(SecantSolver):
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

    regularization: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("regularization", self.regularization, 0.0, open_low=True)

    def no_products(self, z: Tensor) -> Tensor:
        """Return the Gram matrix of an empty history."""
        return z.new_zeros(len(z), self.history_size, self.history_size, dtype=torch.float64)

    def weights(self, state: SecantState, slot: int, g: Tensor) -> tuple[Tensor, SecantState]:
        """Return the weights of the smallest combined residual."""
        return anderson_weights(state, slot, g, self.regularization)


def anderson_weights(state: SecantState, slot: int, g: Tensor, regularization: float) -> tuple[Tensor, SecantState]:
    """Solve the normal equations, scaled to a unit diagonal so that the regularization is relative."""
    row, along_g = inner_products(state.delta_g, state.delta_g[:, slot], g).unbind(2)
    gram = state.products.clone()
    gram[:, slot] = row
    gram[:, :, slot] = row
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    used = diagonal > 0
    scale = torch.where(used, diagonal, torch.ones_like(diagonal)).rsqrt()
    matrix = gram * scale[:, :, None] * scale[:, None, :]
    # Empty rows are zero: a one on their diagonal gives them weight zero.
    matrix = matrix + torch.diag_embed(torch.where(used, regularization, 1.0).to(matrix.dtype))
    solution, info = torch.linalg.solve_ex(matrix, (along_g * scale)[:, :, None])
    gamma = solution[:, :, 0] * scale
    usable = (info == 0)[:, None] & torch.isfinite(gamma).all(dim=1, keepdim=True)
    return torch.where(usable, gamma, torch.zeros_like(gamma)), replace(state, products=gram)
