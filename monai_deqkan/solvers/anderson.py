"""Anderson acceleration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan._checks import check_range
from monai_deqkan.solvers.base import SOLVERS
from monai_deqkan.solvers.products import inner_products
from monai_deqkan.solvers.secant import SecantSolver, SecantState

__all__ = ["AndersonSolver", "anderson_weights", "finite_or_zero", "with_newest_products"]


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
        return z.new_zeros(len(z), self.history_size + 1, self.history_size + 1, dtype=torch.float64)

    def weights(self, state: SecantState, newest: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the weights of the smallest combined residual."""
        gram = with_newest_products(state, newest, count)
        return anderson_weights(gram[:, :count, :count], newest, self.regularization), gram


def with_newest_products(state: SecantState, newest: int, count: int) -> Tensor:
    """Return the Gram matrix of the residuals' history with its two new rows."""
    gram = state.products.clone()
    older = (newest - 1) % gram.shape[1]
    pair = slice(older, newest + 1) if older < newest else slice(0, None, older)  # without a copy
    found = inner_products(state.g[:, pair], state.g[:, :count])
    gram[:, pair, :count] = found
    gram[:, :count, pair] = found.mT
    return gram


def anderson_weights(gram: Tensor, newest: int, regularization: float) -> Tensor:
    r"""Solve the normal equations, scaled to a unit diagonal so that the regularization is relative.

    Args:
        gram: inner products of the differences and of the newest residual, float64 ``(B, m, m)``; zero where empty.
        newest: row of the newest residual.
        regularization: :math:`\lambda`.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Rows without a difference become those of the identity, and get the weight zero.
    diagonal = diagonal.where(diagonal > 0, float("inf"))
    diagonal[:, newest] = float("inf")
    scale = diagonal.rsqrt()
    matrix = gram * scale[:, :, None] * scale[:, None, :]
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0 + regularization)
    solution, _ = torch.linalg.solve_ex(matrix, (gram[:, newest] * scale)[:, :, None])
    return finite_or_zero(solution[:, :, 0] * scale)


def finite_or_zero(gamma: Tensor) -> Tensor:
    """Return weights ``(B, m)``, zero for samples whose system could not be solved: they are infinite or NaN."""
    if math.isfinite(float(gamma.detach().sum())):
        return gamma
    return gamma.where(gamma.isfinite().all(dim=1, keepdim=True), 0.0)
