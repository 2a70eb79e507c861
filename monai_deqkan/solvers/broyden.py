"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_deqkan.solvers.base import SOLVERS
from monai_deqkan.solvers.secant import SecantSolver, SecantState, inner_products

__all__ = ["BroydenSolver", "broyden_weights", "halved_step"]


@SOLVERS.register("broyden")
@dataclass(frozen=True, kw_only=True)
class BroydenSolver(SecantSolver):
    r"""Solve :math:`g(z) = f(z) - z = 0` by Broyden's ("good") quasi-Newton method, each sample on its own.

    The inverse Jacobian starts as :math:`H_0 = -\beta I` with :math:`\beta = 1 - d` and takes up the last
    ``history_size`` pairs :math:`s = \Delta z,\ y = \Delta g`. With these as columns of :math:`S, Y`, and
    :math:`M` the strictly lower triangle (in time) of :math:`S^T S`,

    .. math::
        z_{k+1} = z_k - H g_k = z_k + \beta g_k + (S + \beta Y)\, \beta\, W^{-1} S^T g_k,
        \qquad W = M - \beta\, S^T Y .

    It needs no contraction: the method of choice where :math:`f` has a fixed point but expands around it. Its residual
    may grow for some steps; after a restart from the best iterate the sample's :math:`\beta` is halved, so that the
    same way is not taken twice. All quantities scale with the state.

    Args:
        history_size: number of pairs kept. Memory is two states for each. On a linear map of ``n`` dimensions the
            method ends within ``2 n`` steps if all are kept.
        damping: :math:`d`, dimensionless, in ``[0, 1)``.
        restart_growth: a sample whose residual norm exceeds its best one this many times starts anew from the best.
        rtol: see :class:`FixedPointSolver`.
        atol: see :class:`FixedPointSolver`.
        max_iter: see :class:`FixedPointSolver`.
        on_failure: see :class:`FixedPointSolver`.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        C. G. Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965) 577-593;
        R. H. Byrd, J. Nocedal and R. B. Schnabel, "Representations of quasi-Newton matrices and their use in limited
        memory methods", Math. Program. 63 (1994) 129-156, section 6, for the compact form of the inverse (derived from
        theirs of the matrix by the Sherman-Morrison-Woodbury formula). No line search; the restart is added.
    """

    history_size: int = 20
    restart_growth: float = 1e3

    def no_products(self, z: Tensor) -> Tensor:
        """Return the products of an empty history: those of ``S`` with itself, then those with ``Y``."""
        return z.new_zeros(len(z), self.history_size, 2 * self.history_size, dtype=torch.float64)

    def weights(self, state: SecantState, slot: int, g: Tensor) -> tuple[Tensor, SecantState]:
        """Return the weights of the quasi-Newton step."""
        count = self.history_size
        s, y = state.delta_f[:, slot] - state.delta_g[:, slot], state.delta_g[:, slot]
        # S = delta_f - delta_g is not stored.
        with_f, with_g = (inner_products(rows, s, y, g) for rows in (state.delta_f, state.delta_g))
        with_s = with_f - with_g
        products = state.products.clone()
        products[:, slot, :count] = with_s[..., 0]
        products[:, :, slot] = with_s[..., 0]
        products[:, slot, count:] = with_g[..., 0]
        products[:, :, count + slot] = with_s[..., 1]
        gamma = broyden_weights(products, with_s[..., 2], slot, state.damping)
        return gamma, replace(state, products=products)

    def damping_after_restart(self, state: SecantState, restart: Tensor) -> Tensor:
        """Halve the step of the samples that restart."""
        return torch.where(restart, halved_step(state.damping), state.damping)


def halved_step(damping: Tensor) -> Tensor:
    """Return the damping ``d`` that makes ``1 - d`` half as large."""
    return 0.5 * (1.0 + damping)


def broyden_weights(products: Tensor, along_g: Tensor, slot: int, damping: Tensor) -> Tensor:
    r"""Return :math:`\gamma = -\beta W^{-1} S^T g`, float64 ``(B, m)``.

    Args:
        products: :math:`S^T S` and :math:`S^T Y` side by side, float64 ``(B, m, 2 m)``.
        along_g: :math:`S^T g`, float64 ``(B, m)``.
        slot: row of the newest pair; the others follow backwards in time, around the ring.
        damping: :math:`1 - \beta`, float64 ``(B,)``.
    """
    overlaps, curvatures = products.chunk(2, dim=2)
    age = (slot - torch.arange(along_g.shape[1], device=along_g.device)) % along_g.shape[1]
    beta = 1.0 - damping[:, None, None]
    lower = age[:, None] < age[None, :]  # the row's pair is later than the column's
    matrix = overlaps.where(lower, 0.0) - beta * curvatures

    diagonal = overlaps.diagonal(dim1=-2, dim2=-1)
    used = diagonal > 0
    scale = torch.where(used, diagonal, torch.ones_like(diagonal)).rsqrt()
    matrix = matrix * scale[:, :, None] * scale[:, None, :]
    matrix = matrix + torch.diag_embed((~used).to(matrix.dtype))  # empty rows get the weight zero
    solution, info = torch.linalg.solve_ex(matrix, (along_g * scale)[:, :, None])
    gamma = -beta[..., 0] * solution[:, :, 0] * scale
    usable = (info == 0)[:, None] & torch.isfinite(gamma).all(dim=1, keepdim=True)
    return torch.where(usable, gamma, torch.zeros_like(gamma))
